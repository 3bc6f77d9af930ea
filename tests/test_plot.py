"""Pictures and pages: what is drawn, in which colour, how large, and what is refused."""

import base64
import io
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
Image = pytest.importorskip("PIL.Image")

from dynlrp import plot  # noqa: E402


def pixels(figure, path: Path) -> np.ndarray:
    """Return a figure as (H, W, 3) integers, through the file that a user gets."""
    plot.save(path / "figure.png", figure)
    return np.asarray(Image.open(path / "figure.png").convert("RGB")).astype(int)


def cells(figure, path: Path, shape: tuple[int, int], axes: int = 0) -> np.ndarray:
    """Return the colour in the middle of every relevance cell of the axes numbered ``axes``."""
    picture = pixels(figure, path)
    box = figure.axes[axes].get_position()
    rows = picture.shape[0] * (1 - box.y1 + box.height * (np.arange(shape[0]) + 0.5) / shape[0])
    columns = picture.shape[1] * (box.x0 + box.width * (np.arange(shape[1]) + 0.5) / shape[1])
    return picture[np.ix_(rows.astype(int), columns.astype(int))]


class Reader(HTMLParser):
    """Collect the tags and the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


def test_positive_is_red_negative_blue_zero_white():
    red, blue, white = plot.colours([2.0, -2.0, 0.0], quantile=1).astype(int)
    assert red[0] > 2 * red[1]
    assert red[0] > 2 * red[2]
    assert blue[2] > 2 * blue[0]
    assert blue[2] > blue[1]
    assert white.tolist() == [255, 255, 255]


def test_scale_is_symmetric_and_monotonic():
    values = np.linspace(-3, 3, 61)
    colours = plot.colours(values, quantile=1).astype(int)
    assert (np.diff(colours[30:, 2]) <= 0).all()
    assert (np.diff(colours[:31, 0]) >= 0).all()
    light = colours @ [0.2126, 0.7152, 0.0722]
    assert np.abs(light - light[::-1]).max() < 25  # neither sign looks stronger than the other
    # The scale follows the larger side, so a small negative value stays pale beside a large positive one.
    _, pale = plot.colours([10.0, -0.1], quantile=1).astype(int)
    assert pale.min() > 230


def test_quantile_clips_outliers_and_limit_overrides():
    values = np.ones(1000)
    values[0] = 1e6
    assert (plot.colours(values)[0] == plot.colours(values)[1]).all()
    assert plot.colours(values, quantile=1)[1].min() > 250
    assert (plot.colours([1.0], limit=4) == plot.colours([0.5], limit=2)).all()


def test_sparse_relevance_is_not_lost_by_the_quantile():
    values = np.zeros(10_000)
    values[7] = 3.0
    assert plot.colours(values)[7].tolist() == plot.colours([1.0])[0].tolist()


def test_heatmap_draws_the_largest_positive_pixel_red_and_sums_channels(tmp_path):
    relevance = torch.zeros(3, 4, 6)
    relevance[:, 1, 4] = torch.tensor([1.0, 1.0, -0.5])
    relevance[:, 3, 0] = torch.tensor([-2.0, 1.0, -0.4])
    relevance[:, 0, 0] = torch.tensor([5.0, -5.0, 0.0])
    colours = cells(plot.heatmap(relevance, quantile=1), tmp_path, (4, 6))
    red, blue = colours[1, 4], colours[3, 0]
    assert red[0] > 2 * red[1]
    assert red[0] > 2 * red[2]
    assert blue[2] > 2 * blue[0]
    colours[1, 4] = colours[3, 0] = 255
    assert (colours == 255).all()


def test_heatmap_beside_the_photo(tmp_path):
    photo = np.zeros((40, 40, 3), np.uint8)
    photo[:, 20:] = (0, 200, 0)
    relevance = torch.zeros(1, 4, 4)
    relevance[0, 0, 0] = 1.0
    figure = plot.heatmap(relevance, photo, quantile=1)
    assert cells(figure, tmp_path, (4, 4), axes=0)[0].tolist() == [[0, 0, 0]] * 2 + [[0, 200, 0]] * 2
    assert cells(figure, tmp_path, (4, 4), axes=1)[1, 1].tolist() == [255, 255, 255]
    overlay = cells(figure, tmp_path, (4, 4), axes=2)
    assert overlay[0, 0, 0] > 2 * overlay[0, 0, 1]
    assert np.ptp(overlay[2:], axis=-1).max() == 0  # grey where there is no relevance
    assert overlay[2, 3, 0] > overlay[2, 0, 0]


@pytest.mark.parametrize("layout", ["HWC uint8", "CHW uint8", "CHW floats", "CHW normalised", "HW"])
def test_photo_layouts_show_the_same_picture(tmp_path, layout):
    grey = np.linspace(0, 255, 16).round().reshape(4, 4)
    photo = {
        "HWC uint8": np.repeat(grey[..., None], 3, -1).astype(np.uint8),
        "CHW uint8": torch.from_numpy(grey).to(torch.uint8).expand(3, 4, 4),
        "CHW floats": torch.from_numpy(grey / 255).expand(3, 4, 4),
        "CHW normalised": torch.from_numpy(grey - 127).expand(1, 4, 4),
        "HW": grey,
    }[layout]
    drawn = cells(plot.heatmap(np.ones((4, 4)), photo), tmp_path, (4, 4))[..., 0]
    assert np.abs(drawn - grey).max() <= 1


def test_pool_sums_blocks(tmp_path):
    relevance = np.array([[1.0, 2.0, -4.0], [3.0, -1.0, 0.0]])
    drawn = cells(plot.heatmap(relevance, pool=2, limit=5), tmp_path, (1, 2))
    assert drawn[0].tolist() == plot.colours([5.0, -4.0], limit=5).tolist()


def test_batch_shares_one_scale(tmp_path):
    relevance = torch.zeros(3, 1, 2, 2)
    relevance[0], relevance[1] = 4.0, -1.0
    figure = plot.heatmap(relevance, torch.rand(3, 3, 2, 2), captions=["a", "b", "c"], quantile=1)
    maps = [axes for axes in figure.axes if axes.images][1:6:2]
    wanted = plot.colours([4.0, -1.0, 0.0], quantile=1)
    for axes, colour in zip(maps, wanted, strict=True):
        index = figure.axes.index(axes)
        assert (cells(figure, tmp_path, (2, 2), index) == colour).all()


def test_class_names_are_drawn_and_not_taken_for_mathematics(tmp_path):
    figure = plot.heatmap(np.ones((4, 4)), classes=[("a $x^ cat", 0.6), ("dog", 0.3)], title="$\\frac")
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert "a $x^ cat" in texts
    assert "60.0%" in texts
    assert pixels(figure, tmp_path).shape[2] == 3


def test_png_has_the_size_of_its_panels(tmp_path):
    figures = [plot.heatmap(np.ones((4, 4))), plot.tokens_figure(["one", "two"], [1.0, -1.0], width=5)]
    path = plot.save(tmp_path / "both.PNG", *figures, title="Zwei, ふたつ")
    image = Image.open(path)
    image.load()
    assert image.format == "PNG"
    assert image.text["Title"] == "Zwei, ふたつ"
    assert image.width == 1000  # 5 inches at 200 dots
    assert image.height == sum(int(figure.get_figheight() * 200) for figure in figures)


def test_series_colours_follow_the_sign(tmp_path):
    relevance = np.array([[1.0, -1.0, 0.0], [0.0, 0.5, 0.0]])
    figure = plot.series(relevance, np.array([[0.0, 1.0, 2.0], [1.0, 1.0, 1.0]]), names=["one", "two"])
    band = figure.axes[0].images[0].get_array()
    assert np.array_equal(band[0], plot.colours(relevance[0], limit=1))
    assert np.array_equal(figure.axes[1].images[0].get_array()[0, 1], plot.colours([0.5], limit=1)[0])
    heights = [bar.get_height() for bar in plot.series([3.0, -2.0]).axes[0].patches]
    assert heights == [3.0, -2.0]
    assert pixels(figure, tmp_path).size


def test_tokens_html_escapes_and_colours():
    tokens = ["<script>alert(1)</script>", "\"quoted\" & 'single'", "fine"]
    page = plot.tokens_html(tokens, torch.tensor([2.0, -2.0, 0.0]), title="<b>title</b>")
    assert "<script" not in page
    assert "<b>" not in page
    reader = read(page)
    spans = [attributes for tag, attributes in reader.tags if tag == "span" and "title" in attributes]
    assert [span["title"] for span in spans] == ["+2", "\N{MINUS SIGN}2", "0"]
    assert all(token in reader.text for token in tokens)
    colours = [re.search(r"background:rgb\((\d+),(\d+),(\d+)\)", span["style"] or "") for span in spans]
    red, blue, white = [[int(part) for part in colour.groups()] for colour in colours if colour]
    assert red[0] > 2 * red[2]
    assert blue[2] > 2 * blue[0]
    assert white == [255, 255, 255]


@pytest.mark.parametrize("value", np.linspace(-1, 1, 21))
def test_words_are_readable_on_every_colour(value):
    page = plot.tokens_html(["word"], [value], limit=1)
    found = re.search(r"background:rgb\((\d+),(\d+),(\d+)\);color:(#\w+)", page)
    assert found is not None

    def luminance(rgb):
        part = np.array(rgb) / 255
        return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4) @ [
            0.2126,
            0.7152,
            0.0722,
        ]

    back = luminance([int(part) for part in found.groups()[:3]])
    ink = luminance([255] * 3 if found[4] == "#ffffff" else [0] * 3)
    assert (max(back, ink) + 0.05) / (min(back, ink) + 0.05) >= 4.5  # WCAG AA


@pytest.mark.filterwarnings("ignore:Glyph")
def test_words_of_any_script_and_whitespace(tmp_path):
    tokens = ["слово", "λέξη", "言葉", "كلمة", "🙂", "\n", "  ", "", "$a^b$"]
    relevance = np.linspace(-1, 1, len(tokens))
    text = read(plot.tokens_html(tokens, relevance)).text
    assert all(token in text for token in tokens[:5])
    assert "\u23ce" in text
    assert text.count("\u2423") == 2
    plot.save(tmp_path / "words.html", plot.Tokens(tokens, relevance))
    assert "言葉" in (tmp_path / "words.html").read_text("utf-8")
    assert pixels(plot.Tokens(tokens, relevance), tmp_path).min() < 100


def test_lines_wrap_within_the_figure():
    tokens = ["wide"] * 60 + ["W" * 300] + ["i"] * 60
    figure = plot.tokens_figure(tokens, np.ones(len(tokens)), width=4)
    boxes = [artist for artist in figure.artists if hasattr(artist, "get_boxstyle")]
    assert max(box.get_x() + box.get_width() for box in boxes) <= 4 - 0.14
    assert min(box.get_y() for box in boxes) > 0.5  # above the colour scale
    assert len({box.get_y() for box in boxes}) > 10
    assert "".join(text.get_text() for text in figure.texts) == "".join(tokens)
    corners = sorted((-box.get_y(), box.get_x(), box.get_width()) for box in boxes)
    for (row, left, wide), (other, right, _) in itertools.pairwise(corners):
        assert row != other or left + wide < right  # no two words overlap


def test_page_is_complete_and_needs_no_network(tmp_path):
    path = plot.save(
        tmp_path / "page.html",
        plot.heatmap(np.ones((4, 4)), title="a <map>"),
        plot.Tokens(["<script>", "word"], [1.0, -1.0]),
        title="<script>alert(1)</script>",
        facts={"model": "<img src=x>", "value": 3.5},
        ledger={"inputs": 6.0, "<i>bias</i>": -2.0, "absorbed": -1e-9},
        output=4.0,
    )
    page = path.read_text("utf-8")
    assert not re.search(r"https?://|<script|<link|<i>|src=x>|@import|url\(", page)
    reader = read(page)
    assert {"title", "h1", "img", "table"} <= {tag for tag, _ in reader.tags}
    assert "<script>alert(1)</script>" in reader.text
    assert "<img src=x>" in reader.text
    (source,) = [attributes["src"] or "" for tag, attributes in reader.tags if tag == "img"]
    kind, data = source.split(",")
    assert kind == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).width > 300
    words = reader.text.split()
    assert words[words.index("inputs") + 1 :][:2] == ["+6.0000", "150.0%"]
    assert words[words.index("<i>bias</i>") + 1 :][:2] == ["-2.0000", "-50.0%"]
    assert words[words.index("absorbed") + 1 :][:2] == ["+0.0000", "0.0%"]
    assert words[-2:] == ["output", "+4.0000"]


def test_page_without_table_or_facts(tmp_path):
    page = plot.save(tmp_path / "page.html", plot.Tokens(["a"], [0.0])).read_text("utf-8")
    assert "<table" not in page
    assert "<dl" not in page


def test_all_zero_relevance(tmp_path):
    assert (plot.colours(np.zeros((2, 2))) == 255).all()
    figure = plot.heatmap(torch.zeros(3, 4, 4), torch.zeros(3, 4, 4), pool=3)
    assert (cells(figure, tmp_path, (2, 2), axes=1) == 255).all()
    plot.save(
        tmp_path / "zero.html",
        figure,
        plot.series(np.zeros(5), np.zeros(5)),
        plot.Tokens(["a", "b"], torch.zeros(2)),
        ledger={"inputs": 0.0},
    )


@pytest.mark.parametrize("suffix", ["pic.jpg", "pic", "pic.svg"])
def test_other_suffixes_are_refused_by_name(tmp_path, suffix):
    with pytest.raises(ValueError, match=r"\.png or \.html"):
        plot.save(tmp_path / suffix, plot.Tokens(["a"], [1.0]))
    assert not list(tmp_path.iterdir())


def test_png_without_panels_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs a panel"):
        plot.save(tmp_path / "none.png")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinite"):
        plot.heatmap(torch.tensor([[1.0, bad]]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        plot.heatmap(np.ones((2, 2)), np.full((2, 2), bad))
    with pytest.raises(ValueError, match="NaN or infinite"):
        plot.tokens_html(["a"], [bad])
    with pytest.raises(ValueError, match="NaN or infinite"):
        plot.series([bad, 1.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot.heatmap(np.ones(3)), "must be"),
        (lambda: plot.heatmap(np.ones((0, 3))), "empty"),
        (lambda: plot.heatmap(np.ones((2, 2)), np.ones((2, 2, 5))), "image must be"),
        (
            lambda: plot.heatmap(np.ones((2, 1, 2, 2)), np.ones((3, 1, 2, 2))),
            "2 relevance maps, but 3 images",
        ),
        (lambda: plot.heatmap(np.ones((2, 1, 2, 2)), captions=["one"]), "1 captions"),
        (lambda: plot.heatmap(np.ones((2, 1, 2, 2)), classes=[("a", 1.0)]), "single image"),
        (lambda: plot.heatmap(np.ones((2, 2)), pool=0), "pool"),
        (lambda: plot.series(np.ones((2, 3)), np.ones((3, 2))), "have its shape"),
        (lambda: plot.tokens_html(["a", "b"], [1.0]), "2 tokens"),
        (lambda: plot.tokens_figure([], []), "empty"),
        (lambda: plot.colours([1.0], quantile=0), "quantile"),
        (lambda: plot.colours([1.0], limit=-1.0), "limit"),
        (lambda: plot.colours([1j]), "complex"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_every_real_dtype_is_taken_and_left_alone(dtype):
    relevance = torch.tensor([[1, -1], [0, 2]], dtype=dtype, requires_grad=dtype.is_floating_point)
    assert plot.colours(relevance, quantile=1)[1, 1].tolist() == plot.colours([1.0])[0].tolist()
    assert relevance.tolist() == [[1, -1], [0, 2]]


def test_missing_extra_names_the_cure(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install dynlrp\[plot\]"):
        plot.heatmap(np.ones((2, 2)))
    assert plot.tokens_html(["a"], [1.0])  # needs nothing


def test_no_global_state_is_touched():
    import subprocess
    import sys

    code = (
        "import sys; from dynlrp import plot; import numpy as np; assert 'matplotlib' not in sys.modules;"
        "plot.heatmap(np.ones((2, 2))); plot.tokens_figure(['a'], [1.0]);"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_matrix_has_a_cell_for_every_pair(tmp_path):
    relevance = torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.5, 0.0]])
    figure = plot.matrix(relevance, ["a", "b"], ["x", "y", " "], quantile=1)
    expected = plot.colours(relevance, limit=1)
    assert np.abs(cells(figure, tmp_path, (2, 3)) - expected.astype(int)).max() <= 2
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["x", "y", "\u2423"]


def test_a_large_matrix_names_some_of_its_rows_and_columns():
    figure = plot.matrix(torch.ones(300, 400), [f"row {n}" for n in range(300)], [f"{n}" for n in range(400)])
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert 20 < len(labels) < 150
    assert labels[:2] != ["row 0", "row 1"]
    assert figure.get_figwidth() < 20


@pytest.mark.parametrize(("rows", "columns"), [(["a"], ()), ((), ["a", "b"])])
def test_names_of_a_matrix_must_fit(rows, columns):
    with pytest.raises(ValueError, match="named"):
        plot.matrix(torch.ones(2, 3), rows, columns)


def test_steps_show_their_sum_and_every_row(tmp_path):
    relevance = torch.tensor([[1.0, -2.0, 0.0, 0.0], [0.5, 0.5, 4.0, 0.0]])
    steps = plot.Steps(["a", "<b>", "c", "d"], relevance)
    page = plot.save(tmp_path / "steps.html", steps).read_text("utf-8")
    spans = [dict(attributes) for tag, attributes in read(page).tags if tag == "span" and "title" in attributes]
    assert [span["title"] for span in spans] == ["+1.5", "\u22121.5", "+4", "0"]
    looks = json.loads(re.search("const looks = (.*);", page)[1])
    assert [full for full, _ in looks] == ["2", "4"]
    assert [[number for number, _ in row] for _, row in looks] == [
        ["+1", "\u22122", "0", "0"], ["+0.5", "+0.5", "+4", "0"],
    ]  # fmt: skip
    assert "<b>" not in page.replace("&lt;b&gt;", "")
    assert plot.save(tmp_path / "steps.png", steps).stat().st_size
    with pytest.raises(ValueError, match="4 tokens need relevance"):
        plot.save(tmp_path / "steps.html", plot.Steps(["a", "b", "c", "d"], torch.ones(2, 3)))
