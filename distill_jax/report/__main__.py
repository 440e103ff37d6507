"""Makes tables and curves over finished runs.

Command: `python -m distill_jax.report RUN [RUN ...] --out=FOLDER`.
"""

import argparse
import re
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from distill_jax.errors import suggest
from distill_jax.report import summary
from distill_jax.report.document import Block, Code, Heading, Picture, fragment, to_markdown
from distill_jax.report.runs import read
from distill_jax.storage import files, folders

_START, _END = "<!-- results: {} -->", "<!-- end -->"


def main(argv: Sequence[str]) -> None:
  """Writes the results page, a section of a Markdown file, or both.

  Raises:
    ValueError: a folder has no finished run, or flags or markers are missing. No file is written
      then.
  """
  flags = _parse(argv)
  counts = Counter(folder.resolve() for folder in flags.runs)
  for folder in flags.runs:
    count = counts[folder.resolve()]
    if count > 1:
      raise ValueError(f"RUN: expected each folder once, got {folder} {count} times")
  runs = [read(folder) for folder in flags.runs]
  command = shlex.join(["python", "-m", "distill_jax.report", *argv])
  if flags.readme:
    text = flags.readme.read_bytes().decode()
    comment = command.replace("-->", "-- >")
    content = f"<!-- {comment} -->\n\n{fragment(summary.section(runs))}\n\n"
    readme = replace_section(text, flags.section, content, flags.readme)
  if flags.out:
    _write_page(flags.out, [*summary.page(runs), Heading("Made by"), Code(command)])
  if flags.readme:
    files.write(flags.readme, readme)
    print(f"wrote section {flags.section} of {flags.readme}")


def replace_section(text: str, section: str, content: str, file: Path) -> str:
  """Returns `text` with `content` between the two markers of a section.

  Args:
    text: a Markdown page.
    section: name in the first marker.
    content: Markdown.
    file: path of the page, for the error's message.

  Raises:
    ValueError: the page does not have both markers, in order and once.
  """
  start = _START.format(section)
  if text.count(start) != 1:
    sections = re.findall(_START.format("(.+?)"), text)
    hint = suggest(section, sections) if sections else ""
    raise ValueError(
      f"--section: expected {start} once in {file}, got it {text.count(start)} times{hint}"
    )
  before, rest = text.split(start)
  inside, end, after = rest.partition(_END)
  if not end or _START.partition("{")[0] in inside:
    raise ValueError(f"--section: expected {_END} after {start} in {file}, got none")
  return f"{before}{start}\n{content}{end}{after}"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    "python -m distill_jax.report", description=__doc__, allow_abbrev=False
  )
  parser.add_argument(
    "runs", nargs="+", type=Path, metavar="RUN", help="the folder of a finished run"
  )
  parser.add_argument("--out", type=Path, help="where results.md and its pictures are written")
  parser.add_argument("--readme", type=Path, help="a Markdown file with the section")
  markers = f"{_START.format('SECTION')} and {_END}"
  parser.add_argument("--section", help=f"the tables replace the text between {markers}")
  flags = parser.parse_intermixed_args(argv)
  flags.runs = [folders.resolve(run, "RUN") for run in flags.runs]
  if flags.out:
    flags.out = folders.resolve(flags.out, "--out")
  if flags.readme:
    flags.readme = folders.resolve(flags.readme, "--readme")
  if not (flags.out or flags.readme):
    raise ValueError("flags: expected --out=FOLDER or --readme=FILE --section=NAME, got neither")
  if bool(flags.readme) != bool(flags.section):
    raise ValueError("flags: expected both --readme=FILE and --section=NAME, got one")
  return flags


def _write_page(folder: Path, blocks: Sequence[Block]) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  for block in blocks:
    if isinstance(block, Picture):
      files.write(folder / block.file, block.png)
  files.write(folder / "results.md", to_markdown("Results", blocks))
  print(f"wrote {folder / 'results.md'}")


def run() -> None:
  """Runs the command line; exits with status 2 after an error in the flags or a folder."""
  try:
    main(sys.argv[1:])
  except (ValueError, OSError) as error:
    print(f"distill_jax.report: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  run()
