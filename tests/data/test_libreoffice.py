"""Tests LibreOffice's English-French sentences on small files in the layout of the packages."""

import gettext
import pathlib

import pytest
from libreoffice_files import write_catalog, write_page

from distill_jax.data.sets import libreoffice
from distill_jax.data.sets.libreoffice import Pair
from distill_jax.data.sets.libreoffice_files import read_catalog

ENGLISH = """<h1 id="hd_1">Add <em>Tables</em></h1>
<table><tr><td id="td_1">Cell<p id="par_1">Click OK.<br>The dialog closes.</p></td></tr></table>
<p>No id</p><li id="li_1">One. Two.</li><p id="par_2">BASIC</p><p id="par_3">12</p>
<p id="par_4">Only here</p><p id="par_5">Click OK.</p>"""
FRENCH = """<h1 id="hd_1">Ajouter des <em>tables</em></h1>
<table><tr><td id="td_1">Cellule<p id="par_1">Cliquez\u00a0: OK.<br>Le dialogue se ferme.</p></td>
</tr></table><p>Sans</p><li id="li_1">Un et deux.</li><p id="par_2">BASIC</p><p id="par_3">12 a</p>
<p id="par_5">Cliquez sur OK.</p>"""
ENTRIES = {
  "": "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=n>1;\n",
  "STR_SAVE\4~Save %PRODUCTNAME": "~Enregistrer %PRODUCTNAME",
  "dialog|button\4_Add a_b": "_Ajouter",
  "STR_NAME\4my_file": "mon_fichier",
  "STR_ROWS\4%1 row\0%1 rows": "%1 ligne\0%1 lignes",
}
INSTALLED = pathlib.Path("/", libreoffice.HELP, "fr/text")


@pytest.fixture
def root(tmp_path):
  write_page(tmp_path, "en-US", "scalc/01/add", ENGLISH)
  write_page(tmp_path, "fr", "scalc/01/add", FRENCH)
  write_page(tmp_path, "en-US", "scalc/01/new", ENGLISH)
  write_catalog(tmp_path, "sc", ENTRIES)
  return tmp_path


def test_pages_and_catalogs_are_aligned(root):
  page, catalog = "help/scalc/01/add", "ui/sc"
  pairs = [
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
  assert libreoffice.sentences(root) == pairs
  path = root / "runs" / "libreoffice.tsv"
  assert libreoffice.load(path, root) == pairs
  # The file is read, and the packages are not.
  assert libreoffice.load(path, root / "missing") == pairs
  path.write_text("ui/sc\tSave\n", encoding="utf-8")
  with pytest.raises(ValueError, match=r"^path: .*line 1"):
    libreoffice.load(path, root)


def test_missing_and_corrupt_packages_raise(root):
  with pytest.raises(FileNotFoundError, match=r"^folder: .*apt-get"):
    libreoffice.sentences(root / "missing")
  catalog = write_catalog(root, "sc", ENTRIES)
  content = catalog.read_bytes()
  for corrupt in (content[:-20], content[:40], b"", b"not a catalog at all"):
    catalog.write_bytes(corrupt)
    with pytest.raises(ValueError, match=r"^folder: .*sc\.mo"):
      libreoffice.sentences(root)
  catalog.unlink()
  with pytest.raises(FileNotFoundError, match=r"^folder: .*LC_MESSAGES"):
    libreoffice.sentences(root)
  page = write_page(root, "fr", "scalc/01/add", FRENCH)
  page.write_bytes(b"<p id='par_1'>\xff</p>")
  write_catalog(root, "sc", ENTRIES)
  with pytest.raises(ValueError, match=r"^folder: .*add\.html"):
    libreoffice.sentences(root)


@pytest.mark.parametrize("order", ["<", ">"])
def test_catalogs_are_read_as_gettext_does(tmp_path, order):
  path = write_catalog(tmp_path, "sw", ENTRIES, order)
  with open(path, "rb") as file:
    catalog = gettext.GNUTranslations(file)
  entries = read_catalog(path)
  assert len(entries) == 5
  for context, text, translation in entries[:3]:
    assert catalog.pgettext(context, text) == translation
  (context, single, one), (_, plural, many) = entries[3:]
  assert [catalog.npgettext(context, single, plural, n) for n in (1, 2)] == [one, many]


def test_no_sentence_is_in_two_splits():
  pairs = [
    Pair(f"help/{page}", f"Sentence {number}{'.' * (page % 2)}", f"Phrase {page} {number}")
    for page in range(60)
    for number in (page, page + 1, page * 7 % 60)
  ]
  splits = libreoffice.split(pairs, held_out=4)
  keys = {
    name: [libreoffice.sentence_key(pair.english) for pair in part] for name, part in splits.items()
  }
  every = [key for part in keys.values() for key in part]
  assert len(set(every)) == len(every) == len({libreoffice.sentence_key(p.english) for p in pairs})
  for name, part in splits.items():
    assert {libreoffice.split_of(pair.document, 4) for pair in part} == {name}
  # A sentence of training is in training, wherever else it stands.
  documents = {p.document for p in pairs if libreoffice.split_of(p.document, 4) == "train"}
  expected = {libreoffice.sentence_key(p.english) for p in pairs if p.document in documents}
  assert set(keys["train"]) == expected


def test_long_pairs_are_left_out():
  long = [Pair(f"help/{i}", "a b", f"a b c {i}") for i in range(40)]
  short = [Pair(f"help/{i}", f"a {i}", f"b {i}") for i in range(40)]
  splits = libreoffice.split(long + short, max_words=2)
  assert [p for part in splits.values() for p in part if p in long] == []
  assert sum(map(len, splits.values())) == len(short)


@pytest.mark.parametrize(
  "arguments, field",
  [({"max_words": 0}, "max_words"), ({"held_out": 2}, "held_out"), ({}, "pairs")],
)
def test_arguments_are_checked(arguments, field):
  with pytest.raises(ValueError, match=rf"^{field}: expected"):
    libreoffice.split([Pair("help/a", "a", "b")], **arguments)


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED.is_dir(), reason="the packages are not installed")
def test_counts_of_the_packages():
  pairs = libreoffice.sentences()
  keys = {libreoffice.sentence_key(pair.english) for pair in pairs}
  assert (len(pairs), len(keys), len({pair.document for pair in pairs})) == (81150, 51470, 2581)
  splits = libreoffice.split(pairs, max_words=12)
  assert {name: len(part) for name, part in splits.items()} == {
    "train": 28142,
    "validation": 2606,
    "test": 1694,
  }
