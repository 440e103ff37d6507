"""Documents as Markdown and HTML."""

from html.parser import HTMLParser

from distill_jax.report.document import Code, Heading, Numbers, Table, Text, to_html, to_markdown


class Tags(HTMLParser):
  """The tags and the text of a page."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.text = [], ""
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))

  def handle_data(self, data):
    self.text += data


def test_markup_in_text_is_escaped():
  hostile = '<script>alert("1")</script> | a_b_ *c* [d](e) `f` $g$\nnext'
  blocks = [Text(hostile), Table([hostile, "x"], [[hostile, "1"]]), Code("``` <b>\n</code>")]
  page = Tags(to_html(hostile, blocks))
  assert "script" not in {tag for tag, _ in page.tags}
  assert page.text.count(hostile) == 5 and "``` <b>\n</code>" in page.text
  lines = to_markdown(hostile, blocks).split("\n")
  escaped = r'&lt;script&gt;alert("1")&lt;/script&gt; \| a\_b\_ \*c\* \[d\](e) \`f\` \$g\$ next'
  assert lines[0] == f"# {escaped}" and lines[4] == f"| {escaped} | x |"
  assert lines[-5:] == ["````", "``` <b>", "</code>", "````", ""]


def test_numbers_are_not_on_the_page():
  blocks = [Heading("a"), Numbers("classes", {"secret": 1}), Text("b")]
  assert to_markdown("t", blocks) == "# t\n\n## a\n\nb\n"
  assert "secret" not in to_html("t", blocks)
