"""Tests LibreOffice's English-French sentences on small files in the layout of the packages."""

import pytest
from libreoffice_files import write_catalog, write_page

from distill_jax.data.sets import libreoffice
from distill_jax.data.sets.libreoffice import Pair

ENGLISH = """<h1 id="hd_1">Add <em>Tables</em></h1>
<table><tr><td id="td_1">Cell<p id="par_1">Click OK.<br>The dialog closes.</p></td></tr></table>
<p>No id</p><li id="li_1">One. Two.</li><p id="par_2">BASIC</p><p id="par_3">12</p>
<p id="par_4">Only here</p><p id="par_5">Click OK.</p>"""
FRENCH = """<h1 id="hd_1">Ajouter des <em>tables</em></h1>
<table><tr><td id="td_1">Cellule<p id="par_1">Cliquez\u00a0: OK.<br>Le dialogue se ferme.</p></td>
</tr></table><p>Sans</p><li id="li_1">Un et deux.</li><p id="par_2">BASIC</p><p id="par_3">12 a</p>
<p id="par_5">Cliquez sur OK.</p>"""
ENTRIES = {
  "": "Content-Type: text/plain; charset=UTF-8\n",
  "STR_SAVE\4~Save %PRODUCTNAME": "~Enregistrer %PRODUCTNAME",
  "dialog|button\4_Add a_b": "_Ajouter",
  "STR_NAME\4my_file": "mon_fichier",
  "STR_ROWS\4%1 row\0%1 rows": "%1 ligne\0%1 lignes",
}


@pytest.fixture
def root(tmp_path):
  write_page(tmp_path, "en-US", "scalc/01/add", ENGLISH)
  write_page(tmp_path, "fr", "scalc/01/add", FRENCH)
  write_page(tmp_path, "en-US", "scalc/01/new", ENGLISH)
  write_catalog(tmp_path, "sc", ENTRIES)
  return tmp_path


def test_pages_and_catalogs_are_aligned(root):
  page, catalog = "help/scalc/01/add", "ui/sc"
  assert libreoffice.sentences(root) == [
    Pair(page, "Add Tables", "Ajouter des tables"),
    Pair(page, "Click OK.", "Cliquez : OK."),
    Pair(page, "The dialog closes.", "Le dialogue se ferme."),
    Pair(page, "Cell", "Cellule"),
    Pair(page, "One. Two.", "Un et deux."),
    Pair(catalog, "Save LibreOffice", "Enregistrer LibreOffice"),
    Pair(catalog, "Add ab", "Ajouter"),
    Pair(catalog, "my_file", "mon_fichier"),
    Pair(catalog, "%1 row", "%1 ligne"),
    Pair(catalog, "%1 rows", "%1 lignes"),
  ]
