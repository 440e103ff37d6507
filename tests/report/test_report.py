import base64
import json
import statistics
from html.parser import HTMLParser

import matplotlib
import matplotlib.style
import numpy as np
import pytest
import sklearn.metrics as reference
from scipy.special import log_softmax, softmax

from distill_jax import report
from distill_jax.report import classes, comparison, gallery, plots, results, runs, stored, style
from distill_jax.report.document import Code, Table, Text, to_html, to_markdown

ALONE, STUDENT = results.Group("baseline"), results.Group("student")
CLASSES, ROWS = 4, 80
SKILL = {"teacher": 3.0, "baseline": 0.8, "student": 1.6}
COST = {
  "parameters": 1000.0,
  "bytes": 4000,
  "flops": 2.5e6,
  "latency_ms": 0.25,
  "throughput_128": 12345.6,
}


def make_entries(
  labels, *, seeds=(0, 1, 2), roles=tuple(SKILL), classes=CLASSES, history=True, cost=COST
):
  rng, entries = np.random.default_rng(7), []
  for role in roles:
    for seed in seeds[:1] if role == "teacher" else seeds:
      logits = SKILL[role] * np.eye(classes)[labels] + rng.normal(size=(len(labels), classes))
      lines = [
        {
          "step": step,
          "phase": phase,
          "loss": 2 / step + seed,
          "accuracy": 1 - 1 / step - seed / 100,
        }
        for step in (10, 20, 30)
        for phase in ("train", "validation")
      ]
      own = cost | {"parameters": 8000.0} if role == "teacher" and cost else cost
      entries.append(
        report.Entry(role, seed, logits.astype(np.float32), own, lines if history else [])
      )
  return entries


def make_labels(rows=ROWS, classes=CLASSES):
  return np.random.default_rng(3).integers(0, classes, rows)


def write(folder, entries, labels, *, images=None, class_names=None, run=None):
  names = class_names or [f"c{number}" for number in range(entries[0].logits.shape[1])]
  ids = np.arange(len(labels)) + 100
  path = report.write(
    folder, entries, labels=labels, images=images, ids=ids, class_names=names, run=run or {}
  )
  return (
    path.read_text(),
    (folder / "report.md").read_text(),
    json.loads((folder / "results.json").read_text()),
  )


def cells(markdown):
  """The first table as {row title: {column title: cell}}."""
  first = markdown[markdown.index("|") :].split("\n\n")[0]
  lines = [line.strip("|").split(" | ") for line in first.splitlines()]
  header = [cell.strip() for cell in lines[0]]
  table = {}
  for line in lines[2:]:
    table[line[0].strip()] = dict(zip(header[1:], (cell.strip() for cell in line[1:])))
  return table


class Tags(HTMLParser):
  def __init__(self, text):
    super().__init__()
    self.found, self.text = [], ""
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.found.append((tag, dict(attributes)))

  def handle_data(self, data):
    self.text += data


RUN = {
  "name": "tiny & <i>small</i>",
  "command": "distill-jax --config=x.py --config.a=`b`",
  "config": "configs/x.py",
  "settings": {"rate": 0.1, "student": {"widths": (8, 4), "name": None}},
  "overrides": ["a=`b`"],
  "versions": {"jax": "0.10.2"},
  "git": "abc123",
  "device": "cpu",
  "seconds": {"teacher": 1.26},
  "data": {"train": 100, "test": 80},
  "date": "2025-01-02",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  folder, labels = tmp_path_factory.mktemp("new") / "run" / "report", make_labels()
  entries = make_entries(labels)
  images = np.random.default_rng(0).random((ROWS, 6, 10, 3))
  before = dict(matplotlib.rcParams)
  html, markdown, numbers = write(folder, entries, labels, images=images, run=RUN)
  assert dict(matplotlib.rcParams) == before
  return folder, labels, entries, html, markdown, numbers


def expected_scores(entry, labels, teacher):
  """Written from the definitions, in float64, with scikit-learn where it has them."""
  z, t = entry.logits.astype(np.float64), teacher.logits.astype(np.float64)
  predicted, p = z.argmax(-1), softmax(z, -1)
  confidence, right = p.max(-1), predicted == labels
  index = np.ceil(confidence * 15)
  ece = sum(
    abs(right[index == b].mean() - confidence[index == b].mean()) * (index == b).mean()
    for b in np.unique(index)
  )
  return {
    "Test accuracy, % ↑": 100 * reference.accuracy_score(labels, predicted),
    "Macro precision, % ↑": 100 * reference.precision_score(labels, predicted, average="macro"),
    "Macro recall, % ↑": 100 * reference.recall_score(labels, predicted, average="macro"),
    "Macro F1, % ↑": 100 * reference.f1_score(labels, predicted, average="macro"),
    "Negative log-likelihood, nats ↓": reference.log_loss(labels, p),
    "Expected calibration error, % ↓": 100 * ece,
    "Agreement with the teacher, % ↑": 100 * (predicted == t.argmax(-1)).mean(),
    "KL(teacher ‖ student), nats ↓": (softmax(t, -1) * (log_softmax(t, -1) - log_softmax(z, -1)))
    .sum(-1)
    .mean(),
  }


def test_table_holds_the_scores_their_spread_and_the_paired_difference(written):
  _, labels, entries, _, markdown, _ = written
  table = cells(markdown)
  assert table["Seeds"] == {
    "Teacher": "1", "Student alone": "3", "Student distilled": "3", "Distilled − alone": "", "Distilled / teacher": "",
  }  # fmt: skip
  scores = {(e.role, e.seed): expected_scores(e, labels, entries[0]) for e in entries}
  for title in scores["student", 0]:
    alone, distilled = (
      [scores[role, seed][title] for seed in range(3)] for role in ("baseline", "student")
    )
    unit = 5e-5 if "nats" in title else 5e-3
    for column, values in [
      ("Student alone", alone),
      ("Student distilled", distilled),
      ("Distilled − alone", [a - b for a, b in zip(distilled, alone)]),
    ]:
      mean, spread = map(float, table[title][column].replace("−", "-").split(" ± "))
      assert mean == pytest.approx(statistics.mean(values), abs=1.01 * unit)
      assert spread == pytest.approx(statistics.stdev(values), abs=1.01 * unit)
    if "eacher" in title:
      assert table[title]["Teacher"] == "–"
    else:
      assert float(table[title]["Teacher"]) == pytest.approx(
        scores["teacher", 0][title], abs=1.01 * unit
      )
      ratio = statistics.mean(distilled) / scores["teacher", 0][title]
      assert float(table[title]["Distilled / teacher"]) == pytest.approx(ratio, rel=5e-3)


def test_table_holds_the_cost(written):
  table = cells(written[4])
  assert list(table["Parameters"].values()) == ["8,000", "1,000", "1,000", "–", "0.125"]
  assert table["Size, bytes"]["Student alone"] == "4 k"
  assert table["FLOPs per example"]["Student distilled"] == "2.5 M"
  assert table["Latency of one example, ms"]["Teacher"] == "0.250"
  assert table["Throughput at batch 128, examples/s"]["Teacher"] == "12,346"


def test_json_holds_what_the_table_shows(written):
  _, labels, entries, _, _, numbers = written
  scores = expected_scores(entries[0], labels, entries[0])
  assert numbers["entries"][0]["role"] == "teacher" and numbers["entries"][0]["seed"] == 0
  assert 100 * numbers["entries"][0]["scores"]["f1"] == pytest.approx(scores["Macro F1, % ↑"])
  assert numbers["over_seeds"]["student"]["accuracy"]["number"] == 3
  assert numbers["over_seeds"]["teacher"]["accuracy"]["deviation"] is None
  assert numbers["distilled_minus_alone"]["student"]["accuracy"]["mean"] > 0
  assert numbers["run"]["settings"]["student"] == {"widths": [8, 4], "name": None}


def test_html_loads_nothing_and_holds_the_pictures(written):
  folder, _, _, html, _, _ = written
  tags = Tags(html)
  assert not {tag for tag, _ in tags.found} & {"script", "link", "iframe", "object", "i"}
  sources = [a[key] for _, a in tags.found for key in ("src", "href", "srcset") if key in a]
  pictures = {path.read_bytes() for path in folder.glob("*.png")}
  assert {base64.b64decode(s.removeprefix("data:image/png;base64,")) for s in sources} == pictures
  assert len(pictures) == 6
  assert "url(" not in html and "@import" not in html and "://" not in html


def test_files_are_whole_and_linked(written):
  folder, _, _, _, markdown, _ = written
  names = sorted(path.name for path in folder.iterdir())
  pictures = [
    f"{name}.png"
    for name in ("classes", "confusion", "curves", "disagreements", "parameters", "reliability")
  ]
  assert names == sorted([*pictures, "report.html", "report.md", "results.json"])
  assert all(f"]({name})" in markdown for name in pictures)


def test_run_is_described_and_can_be_repeated(written):
  *_, html, markdown, _ = written
  text = Tags(html).text
  for fact in (
    "configs/x.py",
    "abc123",
    "2025-01-02",
    "student.widths",
    "(8, 4)",
    "0.10.2",
  ):
    assert fact in text
  assert "| Seconds: teacher | 1.3 |" in markdown
  assert "```\ndistill-jax --config=x.py --config.a=`b`\n```" in markdown
  assert "distill-jax --config=x.py --config.a=`b`" in text
  assert "tiny & <i>small</i>" in text and "tiny &amp; &lt;i&gt;small" in markdown


def test_markup_in_text_is_shown_not_run():
  hostile = '<script>alert("1")</script> | a_b_ *c* [d](e) `f` $g$\nnext'
  blocks = [Text(hostile), Table([hostile, "x"], [[hostile, "1"]]), Code("``` <b>\n</code>")]
  tags = Tags(to_html(hostile, blocks))
  assert "script" not in {tag for tag, _ in tags.found}
  assert tags.text.count(hostile) == 5 and "``` <b>\n</code>" in tags.text
  lines = to_markdown(hostile, blocks).split("\n")
  escaped = r'&lt;script&gt;alert("1")&lt;/script&gt; \| a\_b\_ \*c\* \[d\](e) \`f\` \$g\$ next'
  assert lines[0] == f"# {escaped}" and lines[4] == f"| {escaped} | x |"
  assert lines[-5:] == ["````", "``` <b>", "</code>", "````", ""]


def entry(role, seed, right, rows=100):
  """A network that is right on the first `right` of `rows` examples of class 0."""
  logits = np.zeros((rows, 2), np.float32)
  logits[np.arange(rows), (np.arange(rows) >= right).astype(int)] = 2
  return report.Entry(role, seed, logits, {}, [])


@pytest.mark.parametrize(
  "alone, distilled, words",
  [
    ([80, 82, 81], [90, 92, 91], ["Over 3 seeds", "+10.00 points", "larger than its spread", "helped"]),
    ([80, 82, 81], [70, 72, 73], ["−9.33 points", "deviation of 1.15 points", "larger than its spread", "harmed"]),
    ([80, 90, 85], [90, 85, 86], ["+2.00 points", "within its spread", "does not show"]),
    ([80, 90, 85], [75, 90, 85], ["−1.67 points", "within its spread"]),
    ([80, 80], [80, 80], ["+0.00 points", "within its spread"]),
    ([80], [91], ["With one seed", "+11.00 points", "no spread", "1.00 points"]),
    ([], [91], ["not trained alone"]),
    ([80], [], ["No student was distilled"]),
  ],
)  # fmt: skip
def test_verdict_says_plainly_what_the_numbers_bear(alone, distilled, words):
  entries = [entry("baseline", seed, right) for seed, right in enumerate(alone)]
  entries += [entry("student", seed, right) for seed, right in enumerate(distilled)]
  (text,) = comparison.verdicts(results.measure(entries, np.zeros(100, int)), 100)
  assert all(word in text for word in words), text


def test_one_network_a_role_has_a_ratio_and_no_spread(tmp_path):
  entries = [entry("teacher", 0, 90), entry("student", 5, 80)]
  _, markdown, _ = write(tmp_path, entries, np.zeros(100, int))
  assert "one seed, so there is no spread" in markdown
  assert cells(markdown)["Test accuracy, % ↑"]["Distilled / teacher"] == "0.889"
  fast = [entry("teacher", 0, 90)._replace(cost={"throughput_128": 2.0}), entry("student", 5, 80)]
  fast[1] = fast[1]._replace(cost={"throughput_128": 2469.0})
  (table,) = comparison.tables(results.measure(fast, np.zeros(100, int)), 2)
  assert table.rows[-1][-1] == "1,234"


def test_differences_are_paired_by_seed():
  entries = [
    entry("baseline", 1, 50),
    entry("baseline", 2, 70),
    entry("student", 2, 71),
    entry("student", 3, 99),
  ]
  measured = results.measure(entries, np.zeros(100, int))
  change = results.gain(measured, STUDENT, "accuracy")
  assert change.number == 1 and change.deviation is None and change.mean == pytest.approx(0.01)
  assert {group: m.entry.seed for group, m in results.examples(measured).items()} == {
    ALONE: 2,
    STUDENT: 2,
  }
  apart = results.measure([entries[0], entries[3]], np.zeros(100, int))
  assert results.gain(apart, STUDENT, "accuracy") is None
  assert "share no seed" in comparison.verdicts(apart, 100)[0]
  assert comparison.tables(apart, 2)[0].header == ["", "Student alone", "Student distilled"]


def make_generations(labels, names=("first", "second"), **options):
  """Students alone and distilled, and a distilled one more per name after the first, each one better."""
  entries = make_entries(labels, **options)
  for place, name in enumerate(names[1:], 1):
    better = [e for e in entries if e.role == "student" and not e.variant]
    truth = np.eye(entries[0].logits.shape[1])[labels].astype(np.float32)
    entries += [e._replace(logits=e.logits + place * truth, variant=name) for e in better]
  first = [e._replace(variant=names[0]) if e.group == STUDENT else e for e in entries]
  return sorted(
    first, key=lambda e: e.seed
  )  # as a run gives them: all generations of a seed together


def test_several_distilled_students_stand_in_one_table(tmp_path):
  labels = make_labels()
  entries = make_generations(labels)
  images = np.zeros((ROWS, 4, 4, 1))
  _, markdown, numbers = write(tmp_path, entries, labels, images=images)
  scores = {(e.group.name, e.seed): 100 * np.mean(e.logits.argmax(-1) == labels) for e in entries}
  table = cells(markdown)["Test accuracy, % ↑"]
  assert list(table) == ["Teacher", "Student alone", "Distilled: first", "Distilled: second"]
  second = cells(markdown[markdown.index("|") :].split("\n\n", 1)[1])
  changes = second["Test accuracy, % ↑"]
  assert "Seeds" not in second
  assert list(changes) == ["first − alone", "second − alone", "first / teacher", "second / teacher"]
  for name in ("first", "second"):
    own = [scores[f"student: {name}", seed] for seed in range(3)]
    assert float(table[f"Distilled: {name}"].split()[0]) == pytest.approx(np.mean(own), abs=0.006)
    differences = [score - scores["baseline", seed] for seed, score in enumerate(own)]
    mean, spread = map(float, changes[f"{name} − alone"].split(" ± "))
    assert mean == pytest.approx(np.mean(differences), abs=0.006)
    assert spread == pytest.approx(np.std(differences, ddof=1), abs=0.006)
    assert 100 * numbers["distilled_minus_alone"][f"student: {name}"]["accuracy"][
      "mean"
    ] == pytest.approx(np.mean(differences), rel=1e-6)
    ratio = np.mean(own) / scores["teacher", 0]
    assert float(changes[f"{name} / teacher"]) == pytest.approx(ratio, abs=6e-4)
    assert f"the student distilled ({name}) differs from the student alone" in markdown
    right = {e.group.name: e.logits.argmax(-1) == labels for e in entries if e.seed == 0}
    won = (right[f"student: {name}"] & ~right["baseline"]).sum()
    assert f"({name}) is right and the student alone wrong on {won};" in markdown
  assert "which the distilled student (second) gives" in markdown


def test_several_distilled_students_differ_in_every_picture():
  labels = make_labels()
  entries = make_generations(labels, ("a", "b", "c", "d", "e"))
  measured = results.measure(entries, labels)
  known = style.looks(results.groups(entries))
  assert (
    len({look.color for look in known.values()})
    == len({look.marker for look in known.values()})
    == 7
  )
  titles = ["Teacher", "Student alone", *(f"Distilled: {name}" for name in "abcde")]
  chosen = results.examples(measured)
  for picture in (plots.learning_curves(entries), plots.score_against_parameters(measured)):
    (legend,) = picture.legends
    assert [
      text.get_text().split(": 1,0")[0].split(": 8,")[0] for text in legend.get_texts()
    ] == titles
  for picture in (plots.reliability(chosen), plots.confusion(chosen, list("wxyz"))):
    shown = [axes.get_title() for axes in picture.axes if axes.get_title()]
    assert [title.split(",")[0] for title in shown] == titles
  places = plots.score_against_parameters(measured).axes[0].containers
  assert len({place.lines[0].get_xdata()[0] for place in places}) == 7
  with style.context():
    for picture in (plots.reliability(chosen), plots.score_against_parameters(measured)):
      picture.draw_without_rendering()


def test_gains_by_class_are_recalls_paired_by_seed(tmp_path):
  labels = make_labels()
  labels[labels == 2] = 0  # class 2 has no example
  entries = [e for e in make_entries(labels) if (e.role, e.seed) != ("baseline", 2)]
  _, markdown, numbers = write(tmp_path, entries, labels, class_names=["a", "b", "c", "d"])
  recall = {
    (e.role, e.seed): reference.recall_score(
      labels, e.logits.argmax(-1), labels=range(4), average=None, zero_division=0
    )
    for e in entries
  }
  assert [row["name"] for row in numbers["classes"]] == ["a", "b", "d"]
  for number, row in zip((0, 1, 3), numbers["classes"]):
    assert row["examples"] == (labels == number).sum()
    alone = [recall["baseline", seed][number] for seed in (0, 1)]
    distilled = [recall["student", seed][number] for seed in (0, 1, 2)]
    assert row["accuracy"]["baseline"]["mean"] == pytest.approx(np.mean(alone))
    assert row["accuracy"]["student"]["mean"] == pytest.approx(np.mean(distilled))
    gain = [a - b for a, b in zip(distilled, alone)]
    assert row["gain"]["student"]["mean"] == pytest.approx(np.mean(gain))
    assert row["gain"]["student"]["deviation"] == pytest.approx(np.std(gain, ddof=1))
  best = max(numbers["classes"], key=lambda row: row["gain"]["student"]["mean"])
  assert f"in points: {best['name']} (+{100 * best['gain']['student']['mean']:.2f})" in markdown


def class_scores(gains, rows=50):
  return [
    classes.ClassScores(
      number,
      f"c{number}",
      rows,
      {ALONE: results.Spread(0.5, None, 1), STUDENT: results.Spread(0.5 + gain, None, 1)},
      {STUDENT: results.Spread(gain, None, 1)},
    )
    for number, gain in enumerate(gains)
  ]


@pytest.mark.parametrize(
  "gains, words",
  [
    ([0.1, -0.02, 0.0], "c0 (+10.00) gains; c1 (−2.00) loses; 1 of 3 classes does not change."),
    (
      [0.1, 0.2, 0.4, 0.3],
      "c2 (+40.00), c3 (+30.00), c1 (+20.00) gain most (4 gain); no class loses.",
    ),
    ([-0.1, -0.2], "no class gains; c1 (−20.00), c0 (−10.00) lose."),
    ([-1e-12, 1e-12], "no class gains; no class loses; 2 of 2 classes do not change."),
  ],
)
def test_words_name_the_classes_that_change_most(gains, words):
  assert classes.words(class_scores(gains), STUDENT).endswith(f"in points: {words}")


@pytest.mark.parametrize("number", [1, 24, 25, 100])
def test_picture_of_classes_names_all_of_few_and_the_ends_of_many(number):
  gains = np.random.default_rng(0).permutation(np.linspace(-0.4, 0.4, number + 1)[:number])
  picture = classes.class_gains(class_scores(gains), [f"name {n}" for n in range(number)])
  assert style.to_png(picture).startswith(b"\x89PNG")
  order = [f"name {n}" for n in np.argsort(gains)]
  shown = [label.get_text() for label in picture.axes[-1].get_yticklabels()]
  assert shown == (order if number <= 24 else order[:12] + order[-12:])
  alone = [
    line.get_xdata()[0] for line in picture.axes[-1].lines if line.get_label() == "Student alone"
  ]
  distilled = [
    line.get_xdata()[0]
    for line in picture.axes[-1].lines
    if line.get_label() == "Student distilled"
  ]
  np.testing.assert_allclose(alone, 50)
  expected = np.sort(gains) if number <= 24 else np.sort(gains)[[*range(12), *range(-12, 0)]]
  np.testing.assert_allclose(distilled, 50 + 100 * expected)
  if number > 24:
    np.testing.assert_allclose(
      [bar.get_width() for bar in picture.axes[0].patches], 100 * np.sort(gains)
    )
    assert f"{number - 24} class" in picture.axes[1].texts[-1].get_text()


def test_a_written_report_is_read_back(written):
  folder, labels, entries, *_ = written
  (folder.parent / "run.json").write_text("{}")
  run = runs.read(folder.parent)
  assert (run.name, run.data) == (RUN["name"], ("unknown data", 80))
  assert [(m.entry.group, m.entry.seed) for m in run.measured] == [
    (e.group, e.seed) for e in entries
  ]
  expected = [m.scores for m in results.measure(entries, labels)]
  assert [m.scores for m in run.measured] == [pytest.approx(scores) for scores in expected]


def test_numbers_come_back_from_json():
  measured = results.measure(make_generations(make_labels()), make_labels())
  again = stored.from_json(json.loads(json.dumps(stored.as_json(measured, [], {}))))
  assert [(m.entry.group, m.entry.seed, m.scores) for m in again] == [
    (m.entry.group, m.entry.seed, m.scores) for m in measured
  ]


def test_agreement_is_with_the_teacher_of_the_seed_or_the_first():
  entries = [
    entry("teacher", 5, 10),
    entry("teacher", 6, 30),
    entry("student", 6, 30),
    entry("student", 7, 10),
  ]
  scores = [m.scores for m in results.measure(entries, np.zeros(100, int))]
  assert "agreement" not in scores[0]
  assert scores[2]["agreement"] == 1 and scores[3]["agreement"] == 1


def test_numbers_that_are_not_finite_are_null_in_json():
  labels = np.zeros(100, int)
  measured = results.measure(
    [entry("student", 0, 9)._replace(cost={"flops": np.float32("nan")})], labels
  )
  text = json.dumps(
    stored.as_json(measured, [], {"x": float("inf"), "shape": (1, np.int64(2))}), allow_nan=False
  )
  plain = json.loads(text)
  assert plain["entries"][0]["scores"]["flops"] is None and plain["run"] == {
    "x": None,
    "shape": [1, 2],
  }


HARD = {
  "one seed, no teacher": {"seeds": (4,), "roles": ("baseline", "student")},
  "no baseline": {"seeds": (4, 5), "roles": ("teacher", "student")},
  "a teacher alone, nothing else known": {
    "seeds": (4,),
    "roles": ("teacher",),
    "history": False,
    "cost": {},
  },
}


@pytest.mark.parametrize("case", HARD)
def test_what_is_missing_is_left_out(case, tmp_path):
  labels = make_labels()
  _, markdown, _ = write(tmp_path, make_entries(labels, **HARD[case]), labels)
  table, headings = (
    cells(markdown),
    [line[3:] for line in markdown.splitlines() if line.startswith("## ")],
  )
  both = case == "one seed, no teacher"
  assert ("Agreement with the teacher, % ↑" in table) == (case == "no baseline")
  assert ("Distilled − alone" in table["Seeds"]) == both
  assert any("plain one wrong" in heading for heading in headings) == both
  assert not (tmp_path / "disagreements.png").exists()
  assert (
    ("Learning curves" in headings)
    == ("Accuracy against size" in headings)
    == ("history" not in HARD[case])
  )
  assert ("one seed, so there is no spread" in markdown) == ("no baseline" != case)
  assert ("±" in table["Test accuracy, % ↑"].get("Student distilled", "")) == (
    case == "no baseline"
  )


def test_many_classes_one_never_seen_and_names_hard_to_draw(tmp_path):
  labels = np.arange(300) % 100
  labels[labels == 3] = 4
  names = [f"a long class name $number_{number}$ <b>" for number in range(98)] + ["日本語", ""]
  names[0], names[3] = r"$\frac$", "abs|ent"  # as mathematics, the first cannot be drawn
  entries = make_entries(labels, seeds=(0,), classes=100, history=False)
  html, markdown, _ = write(
    tmp_path, entries, labels, images=np.zeros((300, 9, 5, 1), np.uint8), class_names=names
  )
  assert r"Without a test example: abs\|ent (1 of 100 classes)." in markdown
  assert "Top-5 accuracy, % ↑" in cells(markdown)
  assert "<b>" not in html


def test_labels_fit_and_differ():
  names = [
    "cat",
    "a very long name 1",
    "a very long name 2",
    "日本",
    " two\nlines ",
    "naïve",
    "",
    "cat",
  ]
  labels = style.class_labels(names, 12)
  assert labels == [
    "0 cat…",
    "1 a very lo…",
    "2 a very lo…",
    "class 3",
    "two lines",
    "naïve",
    "class 6",
    "7 cat…",
  ]
  assert max(map(len, labels)) <= 12


def test_curves_are_means_with_bands_over_the_common_steps():
  def history(steps, losses):
    return [{"step": s, "phase": "train", "loss": v} for s, v in zip(steps, losses)]

  entries = [
    entry("student", 0, 9)._replace(
      history=history([0, 10, 20, 10], [4.0, 9.0, 2.0, 3.0])
    ),  # 10 was logged again
    entry("student", 1, 9)._replace(
      history=history([5, 10, 15, 30], [1.0, 1.0, float("nan"), 1.0])
    ),
    entry("baseline", 0, 9)._replace(history=history([7], [2.0])),
  ]
  axes = plots.learning_curves(entries).axes
  lines = {line.get_label(): line for line in axes[0].lines}
  baseline, student = axes[0].lines
  np.testing.assert_allclose(baseline.get_xydata(), [[7, 2]])
  np.testing.assert_allclose(student.get_xydata(), [[5, 2.25], [10, 2], [20, 1.5]])
  assert len(lines) == 2 and not axes[1].lines
  (band,) = axes[0].collections
  top = band.get_datalim(axes[0].transData).y1
  assert top == pytest.approx(2.25 + statistics.stdev([3.5, 1.0]))
  assert plots.learning_curves([entry("student", 0, 9)]) is None


def test_one_curve_per_role_in_its_own_look():
  picture = plots.learning_curves(make_entries(make_labels()))
  for axes in picture.axes:
    assert [line.get_color() for line in axes.lines] == [
      look.color for look in style.LOOKS.values()
    ]
    assert len({line.get_linestyle() for line in axes.lines}) == 3
  np.testing.assert_allclose(
    picture.axes[1].lines[1].get_ydata(), [100 * (1 - 1 / s - 0.01) for s in (10, 20, 30)]
  )


@pytest.mark.parametrize("classes", [2, 20, 21])
def test_confusion_matrices_show_counts_of_few_classes(classes):
  labels = np.arange(200) % classes
  measured = results.measure(
    make_entries(labels, seeds=(1,), classes=classes, history=False), labels
  )
  chosen = results.examples(measured)
  picture = plots.confusion(chosen, [f"class number {c}" for c in range(classes)])
  panels = picture.axes[:3]
  for axes, m in zip(panels, chosen.values()):
    truth = reference.confusion_matrix(labels, m.entry.logits.argmax(-1), labels=range(classes))
    (image,) = axes.images
    np.testing.assert_allclose(
      image.get_array(), truth / np.maximum(truth.sum(1, keepdims=True), 1)
    )
    shown = {
      (int(t.get_position()[1]), int(t.get_position()[0])): int(t.get_text()) for t in axes.texts
    }
    nonzero = {place: int(n) for place, n in np.ndenumerate(truth) if n}
    assert shown == (nonzero if classes <= 20 else {})
    assert len(axes.get_xticks()) == (classes if classes <= 20 else 7)


def test_reliability_diagram_shows_accuracy_at_the_mean_confidence():
  labels = make_labels()
  chosen = results.examples(results.measure(make_entries(labels, history=False), labels))
  picture = plots.reliability(chosen)
  for axes, m in zip(picture.axes[:3], chosen.values()):
    p = softmax(m.entry.logits.astype(np.float64), -1)
    confidence, right = p.max(-1), p.argmax(-1) == labels
    index = np.ceil(confidence * 15)
    expected = [
      [100 * confidence[index == b].mean(), 100 * right[index == b].mean()]
      for b in np.unique(index)
    ]
    np.testing.assert_allclose(axes.lines[1].get_xydata(), expected, rtol=1e-4)
    assert f"ECE {100 * m.scores['ece']:.2f} %" in axes.get_title()


def test_accuracy_stands_at_the_number_of_parameters():
  labels = make_labels()
  measured = results.measure(make_entries(labels, history=False), labels)
  (axes,) = plots.score_against_parameters(measured).axes
  assert axes.get_xscale() == "log"
  means = [container.lines[0].get_xydata()[0] for container in axes.containers]
  np.testing.assert_allclose([m[0] for m in means], [8000, 1000, 1000], rtol=0.06)
  expected = [
    100 * results.over_seeds(measured, results.Group(role), "accuracy").mean
    for role in results.ROLES
  ]
  np.testing.assert_allclose([m[1] for m in means], expected)


@pytest.mark.parametrize(
  "shape, dtype", [((8, 8, 1), np.float32), ((4, 12, 3), np.uint8), ((30, 5, 2), np.float64)]
)
def test_gallery_shows_where_the_distilled_student_alone_is_right(shape, dtype):
  labels = make_labels(200)
  labels[0] = -1
  baseline, student = make_entries(labels, seeds=(0,), roles=("baseline", "student"), history=False)
  found = gallery.compare(student, baseline, labels)
  alone, distilled = (e.logits.argmax(-1) == labels for e in (baseline, student))
  assert list(found.won) == [r for r in range(1, 200) if distilled[r] and not alone[r]]
  assert list(found.lost) == [r for r in range(1, 200) if alone[r] and not distilled[r]]
  images = (np.random.default_rng(0).random((200, *shape)) * 255).astype(dtype)
  names = ["zero", "one", r"$\frac$", "three"]
  picture = gallery.gallery(found.won, images, np.arange(200) + 7, labels, baseline, names)
  assert style.to_png(picture).startswith(b"\x89PNG")
  assert len(picture.axes) == min(24, len(found.won))
  for axes, row in zip(picture.axes, found.won):
    shown = [text.get_text() for text in axes.texts]
    assert shown == [
      f"true: {names[labels[row]]}",
      f"alone: {names[baseline.logits[row].argmax()]}",
    ]
    assert axes.get_title() == f"id {row + 7}"
    pixels = images[row].astype(np.float64)
    low, high = (0, 255) if dtype == np.uint8 else (images.min(), images.max())
    expected = (pixels - low) / (high - low)
    np.testing.assert_allclose(
      axes.images[0].get_array(), expected if shape[-1] == 3 else expected.mean(-1), atol=1e-6
    )


def test_pictures_do_not_depend_on_the_users_style(tmp_path):
  labels = make_labels()
  entries = make_entries(labels, seeds=(0,), roles=("student",), history=False)
  write(tmp_path / "a", entries, labels)
  with matplotlib.style.context("dark_background"):
    write(tmp_path / "b", entries, labels)
  for picture in (tmp_path / "a").glob("*.png"):
    assert picture.read_bytes() == (tmp_path / "b" / picture.name).read_bytes()


@pytest.mark.parametrize(
  "change, message",
  [
    ({"entries": []}, "entries is empty"),
    (
      {"entries": [entry("studnet", 3, 9)]},
      "'studnet' of seed 3: unknown role; did you mean 'student'",
    ),
    ({"entries": [entry("student", 3, 9)] * 2}, "'student' of seed 3 more than once"),
    (
      {"entries": [entry("student", 3, 9)._replace(variant="a$b")]},
      "student: a.b.* without '.', got 'a.b'",
    ),
    (
      {"entries": [entry("student", 3, 9)._replace(variant="a" * 25)]},
      "at most 24 printable characters",
    ),
    (
      {"entries": [entry("baseline", 3, 9)._replace(variant="x")]},
      "only a distilled student has a variant, got 'x'",
    ),
    ({"class_names": ["a", "b", "c"]}, r"logits \(100, 2\), expected .* \(100, 3\)"),
    ({"labels": np.zeros(99, int)}, r"logits \(100, 2\), expected .* \(99, 2\)"),
    ({"labels": np.full(100, -1)}, "no label >= 0"),
    ({"ids": np.arange(9)}, "100 labels, 9 ids and no images"),
    ({"images": np.zeros((9, 2, 2, 1))}, "100 labels, 100 ids and 9 images"),
    ({"images": np.zeros((100, 4))}, r"images must be \[N, H, W, C\], got \(100, 4\)"),
  ],
)
def test_arguments_that_do_not_fit_are_refused(change, message, tmp_path):
  good = {
    "entries": [entry("student", 3, 9)], "labels": np.zeros(100, int), "images": None, "ids": np.arange(100),
    "class_names": ["a", "b"], "run": {},
  }  # fmt: skip
  arguments = good | change
  with pytest.raises(ValueError, match=message):
    report.write(tmp_path / "x", arguments.pop("entries"), **arguments)
  assert not (tmp_path / "x").exists()
