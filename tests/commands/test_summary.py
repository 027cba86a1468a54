"""The summary of a network: stages, totals, options, from the shell, mistakes."""

import json
import re
import signal
import subprocess
import sys
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import shell
from shell import ROOT
from xception_flax import MODELS, create_model
from xception_flax.commands import summary
from xception_flax.display.blocks import EDGE
from xception_flax.models import costs

SVG = "{http://www.w3.org/2000/svg}"

DIGITS = str(ROOT / "configs" / "digits.py")

# (stage, output, stride) at 299 px.
STAGES = {
    # Paper, section 3 and figure 5.
    "xception": [
        ("block1", (147, 147, 64), 2),
        ("block2", (74, 74, 128), 4),
        ("block3", (37, 37, 256), 8),
        *((f"block{b}", (19, 19, 728), 16) for b in range(4, 13)),
        ("block13", (10, 10, 1024), 32),
        ("block14", (10, 10, 2048), 32),
        ("predictions", (1000,), None),
    ],
    # Inception V3 paper, table 1; the sizes of its padded layers are Keras'.
    "inception_v3": [
        ("stem", (35, 35, 192), 8),
        ("mixed0", (35, 35, 256), 8),
        ("mixed1", (35, 35, 288), 8),
        ("mixed2", (35, 35, 288), 8),
        *((f"mixed{i}", (17, 17, 768), 16) for i in range(3, 8)),
        ("mixed8", (8, 8, 1280), 32),
        ("mixed9", (8, 8, 2048), 32),
        ("mixed10", (8, 8, 2048), 32),
        ("predictions", (1000,), None),
    ],
    # DeepLab v3+, figure 4, with strides rounded up by the symmetric padding.
    "xception41": [
        ("block1", (150, 150, 64), 2),
        ("block2", (75, 75, 128), 4),
        ("block3", (38, 38, 256), 8),
        *((f"block{b}", (19, 19, 728), 16) for b in range(4, 13)),
        ("block13", (10, 10, 1024), 32),
        ("block14", (10, 10, 2048), 32),
        ("predictions", (1000,), None),
    ],
    "xception71": [
        ("block1", (150, 150, 64), 2),
        ("block2", (75, 75, 128), 4),
        ("block3", (75, 75, 256), 4),
        ("block4", (38, 38, 256), 8),
        ("block5", (38, 38, 728), 8),
        *((f"block{b}", (19, 19, 728), 16) for b in range(6, 23)),
        ("block23", (10, 10, 1024), 32),
        ("block24", (10, 10, 2048), 32),
        ("predictions", (1000,), None),
    ],
}  # fmt: skip

# Millions of trainable parameters at 1000 classes: the paper's table 3, Keras (Inception V3), the cards
# of timm's models (one decimal).
MILLIONS = {
    "xception": 22.856,
    "xception_towers": 22.856,
    "inception_v3": 23.817,
    "xception41": 27.0,
    "xception65": 39.9,
    "xception71": 42.3,
    "xception41p": 26.9,
    "xception65p": 39.8,
    "lenet": 0.404,  # by hand: 5*5*(3*32 + 32*64 + 64*128) + 129*128 + 129*1000
}

# Networks that could confuse stages: nothing after a block, segments of channels, a tower beside the classifier, ...
# Two middle blocks stand for 8 or 16; whole networks are in STAGES and in the test of --all.
VARIANTS = [
    ("xception", {}),
    ("xception", {"residual": False, "middle_repeats": 2}),
    ("xception", {"output_stride": 8, "middle_repeats": 2, "remat": True}),
    ("xception", {"num_classes": 0, "middle_repeats": 0}),
    ("xception", {"fc_layers": (64, 64), "middle_repeats": 2}),
    ("xception_towers", {"towers": 3, "middle_repeats": 2}),
    ("xception_towers", {"towers": 3, "middle_repeats": 2, "order": "pointwise_first", "mid_activation": "relu"}),
    ("inception_v3", {"auxiliary": True}),
    ("inception_v3", {"remat": True, "num_classes": 0}),
    ("xception41", {"middle_repeats": 2}),
    ("xception41", {"middle_repeats": 2, "output_stride": 16, "remat": True}),
    ("xception71", {"middle_repeats": 2}),
    ("xception65p", {"middle_repeats": 2}),
    ("xception65p", {"middle_repeats": 0, "output_stride": 8, "num_classes": 0}),
    ("lenet", {}),
    ("lenet", {"features": (8,) * 7}),
    ("lenet", {"features": (8, 16), "num_classes": 0}),
]


def ids(value):
    return value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items())


def totals(rows) -> list[int]:
    return [sum(getattr(row, k) for row in rows) for k in ("parameters", "statistics", "macs", "activation_bytes")]


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    return shell.call(monkeypatch, capsys, summary.main, *arguments)


def from_shell(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return shell.run("-m", "xception_flax", "summary", *arguments, **variables)


# Rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STAGES)
def test_stages(name):
    """Also where the last layer of a stage has another shape than the stage: pooling, a concatenation of towers."""
    rows = summary.summarize(create_model(name), (299, 299, 3))
    assert [(row.name, row.shape, row.stride) for row in rows] == STAGES[name]


def test_a_block_without_residual_ends_with_its_pooling():
    """Section 4.6's ablation: the last layer of block 2 has 147 x 147 pixels, the block 74 x 74 as with a residual."""
    rows = summary.summarize(create_model("xception", residual=False), (299, 299, 3))
    assert [(row.name, row.shape, row.stride) for row in rows] == STAGES["xception"]


@pytest.mark.parametrize(("name", "fields"), VARIANTS, ids=ids)
def test_variants(name, fields):
    """Stages have the sizes and strides of the network's `endpoints`, and every layer is counted once."""
    model, size = create_model(name, **fields), 32 if name == "lenet" else 299
    size = max(size, 2 * max(model.strides.values()))
    stages = summary.summarize(model, (size, size, 3))
    spatial = [row for row in stages if len(row.shape) == 3]

    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)

    def compute(x):
        return model.init_with_output(jax.random.key(0), x, train=False, method="endpoints")[0]

    endpoints = jax.eval_shape(compute, image)
    ends = {(endpoints[stage].shape[1], stride) for stage, stride in model.strides.items()}
    if name == "inception_v3":  # its stem is one stage with endpoints 1 and 2 in it
        ends -= {(147, 2), (71, 4)}
    assert {(row.shape[0], row.stride) for row in spatial} == ends
    assert spatial[-1].shape == endpoints[list(model.strides)[-1]].shape[1:]

    measured = costs.list_layers(model, (size, size, 3))
    assert totals(stages) == totals(summary.fold(stages)) == totals(measured)


def test_the_middle_flow_is_one_row():
    """Eight blocks of three separable convolutions from 728 channels to 728: 24 * (9 + 728) * 728 weights."""
    folded = summary.fold(summary.summarize(create_model("xception"), (299, 299, 3)))
    assert [row.name for row in folded if row.count == 1] == [
        "block1", "block2", "block3", "block4", "block13", "block14", "predictions",
    ]  # fmt: skip
    weights = 24 * (9 + 728) * 728
    batch_norm = 24 * 2 * 728
    assert folded[4] == summary.Row(
        name="block5 ... block12",
        count=8,
        shape=(19, 19, 728),
        stride=16,
        parameters=weights + batch_norm,
        statistics=batch_norm,
        macs=weights * 19 * 19,
        activation_bytes=24 * 3 * 19 * 19 * 728 * 4,  # depthwise, pointwise, batch normalization
    )


def test_only_equal_neighbors_are_folded():
    row = summary.Row("a", 1, (4, 4, 8), 2, 10, 2, 160, 512)
    other = row._replace(name="c", macs=161)
    rows = [row, row._replace(name="b"), other, row._replace(name="d")]
    assert summary.fold(rows) == [
        summary.Row("a ... b", 2, (4, 4, 8), 2, 20, 4, 320, 1024),
        other,
        row._replace(name="d"),
    ]
    # Inception V3: mixed5 and mixed6 alone have 160 features.
    folded = summary.fold(summary.summarize(create_model("inception_v3"), (299, 299, 3)))
    assert [(row.name, row.count) for row in folded if row.count > 1] == [("mixed5 ... mixed6", 2)]


def test_strides_are_exact_where_borders_are_most_of_the_image():
    """Inception V3 at its smallest size: mixed3 is 3 x 3 of 75 x 75, but its stride is 16, not 25 or 32."""
    rows = {row.name: row for row in summary.summarize(create_model("inception_v3"), (75, 75, 3))}
    assert (rows["mixed3"].shape, rows["mixed3"].stride) == ((3, 3, 768), 16)
    assert (rows["mixed10"].shape, rows["mixed10"].stride) == ((1, 1, 2048), 32)
    # The auxiliary tower pools stage 4 with stride 3.
    layers = summary.summarize(create_model("inception_v3", auxiliary=True), (299, 299, 3), by="layers")
    auxiliary = {row.name: (row.shape, row.stride) for row in layers if row.name.startswith("auxiliary_conv1")}
    assert auxiliary["auxiliary_conv1"] == ((5, 5, 128), 16 * 3)


def test_images_need_not_be_square():
    rows = {row.name: row for row in summary.summarize(create_model("xception"), (64, 320, 1))}
    assert (rows["block13"].shape, rows["block13"].stride) == ((2, 10, 1024), 32)


# Command -------------------------------------------------------------------------------------------


def test_from_the_shell():
    """In a process whose only allowed platform does not exist, so no device but the CPU can be opened."""
    result = from_shell("xception", JAX_PLATFORMS="no_such_accelerator", COLUMNS="40")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout.splitlines()[-1]) == {
        "name": "xception",
        "image_size": 299,
        "channels": 3,
        "num_classes": 1000,
        "parameters": 22_855_952,  # paper, table 3
        "statistics": 54_528,
        "macs": 8_357_403_496,  # 8.357 G, as tests/models/test_models.py counts them
        "activation_bytes": 227_852_480,
        "parameter_bytes": 4 * 22_855_952,
    }
    # Neither the width of the terminal nor its absence cuts a number.
    lines = result.stdout.splitlines()
    assert "block5 ... block12 x8   19x19x728      16  12,911,808  4.649 G  55.6%    75.69" in lines
    for total in ("22,855,952", "91.42 MB as float32", "54,528", "8.357 G an image", "227.9 MB an image as float32"):
        assert any(line.endswith("  " + total) for line in lines), total


def test_all_from_the_shell():
    result = from_shell("--all")
    assert (result.returncode, result.stderr) == (0, "")
    *table, last = result.stdout.splitlines()
    records = json.loads(last)
    assert [record["name"] for record in records] == list(MODELS)
    assert set(MILLIONS) == set(MODELS), "add a row to MILLIONS, or take one away"
    assert {r["name"]: r["parameters"] / 1e6 for r in records} == pytest.approx(MILLIONS, abs=0.05)
    by_name = {record["name"]: record for record in records}
    assert by_name["inception_v3"]["parameters"] == 23_817_352  # Keras
    assert by_name["lenet"]["parameters"] == 25 * (3 * 32 + 32 * 64 + 64 * 128) + 129 * 128 + 129 * 1000
    assert {r["name"]: r["image_size"] for r in records} == dict.fromkeys(MODELS, 299) | {"lenet": 32}
    rows = {line.split()[0]: line.split()[1:] for line in table[3:]}
    assert rows["xception"] == ["299", "10x10x2048", "22,855,952", "54,528", "8.357", "G", "227.9"]
    assert rows["inception_v3"][1] == "8x8x2048"
    assert rows["lenet"][1] == "4x4x128"
    assert list(rows) == list(MODELS)
    assert max(map(len, table)) <= 80


@pytest.mark.parametrize("options", [[], ["--layers"]])
def test_tables_fit_a_terminal_of_80_columns(monkeypatch, capsys, options):
    """The widest tables: a row for 16 blocks, and layers of blocks with two digits."""
    code, out, _ = run(monkeypatch, capsys, "xception71", *options)
    assert code == 0
    *lines, _ = out.splitlines()
    assert 75 < max(map(len, lines)) <= 80


def test_a_picture(monkeypatch, capsys, tmp_path):
    """Figure 5: its texts and bars as an SVG has them; the bars are the shares of the sums that the JSON has."""
    code, out, _ = run(monkeypatch, capsys, "xception", "--picture", tmp_path / "x.svg")
    assert code == 0
    assert f"picture                {tmp_path / 'x.svg'}" in out
    totals = json.loads(out.splitlines()[-1])
    drawn = ElementTree.parse(tmp_path / "x.svg").getroot()
    texts = [text.text for text in drawn.iter(f"{SVG}text")]
    names = [
        "image",
        *(f"block{i}" for i in (1, 2, 3, 4)),
        "block5 ...",
        "block12  x 8",
        "block13",
        "block14",
        "predictions",
    ]
    assert [text for text in texts if text in names] == names
    assert [text for text in texts if re.fullmatch(r"\d+( x \d+){2}", text)] == [
        *("299 x 299 x 3", "147 x 147 x 64", "74 x 74 x 128", "37 x 37 x 256", "19 x 19 x 728", "19 x 19 x 728"),
        *("10 x 10 x 1024", "10 x 10 x 2048"),
    ]
    assert texts.count("residual") == 4  # those with a convolution
    rows = summary.fold(summary.summarize(create_model("xception"), (299, 299, 3)))
    for cost, total in (("parameters", 22_855_952), ("macs", 8_357_403_496), ("activation_bytes", 227_852_480)):
        assert totals[cost] == total == sum(getattr(row, cost) for row in rows)
    written = ["12.91 M", "4.649 G", "75.69 MB", "66.46 MB"]
    assert [text for text in texts if text in written] == ["12.91 M", "4.649 G", "66.46 MB", "75.69 MB"]
    # Bars are rectangles on a common line: the height of each is its share.
    bars = [corners(path.get("d")) for path in drawn.iter(f"{SVG}path") if f"fill: {EDGE}" in path.get("style", "")]
    heights = [max(ys) - min(ys) for _, ys in bars]
    assert len(heights) == 3 * len(rows)
    for i, cost in enumerate(("parameters", "macs", "activation_bytes")):
        of_cost = heights[i * len(rows) : (i + 1) * len(rows)]
        expected = [getattr(row, cost) / totals[cost] for row in rows]
        np.testing.assert_allclose(np.array(of_cost) / sum(of_cost), expected, atol=1e-4)


def corners(path: str) -> tuple[list[float], list[float]]:
    """Returns the coordinates of a path of straight lines."""
    numbers = [float(number) for number in re.findall(r"-?[0-9.]+", path)]
    return numbers[::2], numbers[1::2]


@pytest.mark.parametrize("name", list(MODELS))
def test_a_picture_of_each_network(monkeypatch, capsys, tmp_path, name):
    """Nothing is drawn beyond its edges."""
    path = tmp_path / f"{name}.png"
    assert run(monkeypatch, capsys, name, "--picture", path)[0] == 0
    ink = np.asarray(Image.open(path).convert("L")) < 250
    assert not np.any([ink[0].any(), ink[-1].any(), ink[:, -1].any()])


def test_layers(monkeypatch, capsys):
    model = create_model("xception", middle_repeats=1)
    layers, measured = summary.summarize(model, (64, 64, 3), by="layers"), costs.list_layers(model, (64, 64, 3))
    assert [(row.name, row.shape) for row in layers] == [("/".join(m.path), m.shape) for m in measured]
    assert totals(layers) == totals(measured)

    code, out, _ = run(monkeypatch, capsys, "lenet", "--layers")
    assert code == 0
    _, title, headers, *rows = out.splitlines()[:8]
    assert title == "lenet, images 32 x 32 x 3, 1,000 classes"
    assert re.split(" {2,}", headers) == ["layer", "output", "stride", "parameters", "MACs", "act. MB"]
    # The layer does not include the pooling, as its stage does: 32 x 32 pixels, 5 x 5 x 3 x 32 weights.
    assert rows[0].split() == ["conv1", "32x32x32", "1", "2,400", "2.458", "M", "0.131"]
    assert [row.split()[0] for row in rows] == ["conv1", "conv2", "conv3", "fc1", "predictions"]


def test_fields_of_the_network(monkeypatch, capsys):
    def record(*arguments):
        code, out, _ = run(monkeypatch, capsys, *arguments)
        assert code == 0
        return json.loads(out.splitlines()[-1])

    plain = record("xception")
    half = record("xception", "--config.model.width=0.5", "--config.model.output_stride=16", "--channels", "1")
    model = create_model("xception", width=0.5, output_stride=16)
    assert [half[k] for k in ("parameters", "statistics", "macs", "activation_bytes")] == totals(
        costs.list_layers(model, (299, 299, 1))
    )
    # Half the bytes, except for the 1000 logits, which are always float32.
    bfloat16 = record("--config.model.dtype=bfloat16", "xception", "--config.model.param_dtype=bfloat16")
    assert bfloat16["activation_bytes"] - 4000 == (plain["activation_bytes"] - 4000) / 2
    assert bfloat16["parameter_bytes"] == plain["parameter_bytes"] / 2
    # A backbone lacks 2048 x 1000 weights and 1000 biases.
    backbone = record("--num-classes", "0", "--image-size", "64", "xception")
    assert plain["parameters"] - backbone["parameters"] == 2_049_000
    assert (backbone["image_size"], backbone["num_classes"]) == (64, 0)
    assert backbone == record("xception", "--image-size=64", "--config.model.num_classes=0")


def test_all_with_options(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "--all", "--image-size", "75", "--config.model.width=0.25")
    assert code == 0
    records = json.loads(out.splitlines()[-1])
    assert {record["image_size"] for record in records} == {75}
    lenet = costs.list_layers(create_model("lenet", width=0.25), (75, 75, 3))
    assert [records[-1][k] for k in ("parameters", "statistics", "macs", "activation_bytes")] == totals(lenet)


def test_a_recipe(monkeypatch, capsys):
    """configs/digits.py: 184,050 parameters; images of 48 x 48 pixels and one channel, ten classes."""
    code, out, _ = run(monkeypatch, capsys, "--config", DIGITS)
    assert code == 0
    record = json.loads(out.splitlines()[-1])
    keys = ("name", "image_size", "channels", "num_classes", "parameters")
    assert [record[k] for k in keys] == ["xception", 48, 1, 10, 184_050]

    code, out, _ = run(monkeypatch, capsys, "--config", f"{DIGITS}:lenet")
    assert [json.loads(out.splitlines()[-1])[k] for k in keys] == ["lenet", 48, 1, 10, 74_010]

    # Another network has its own defaults, not those of the recipe's: 65 has 16 middle blocks, 41 has 8.
    imagenet = str(ROOT / "configs" / "imagenet.py")
    code, out, _ = run(monkeypatch, capsys, "--config", imagenet, "--config.model.name=xception65")
    assert code == 0
    record = json.loads(out.splitlines()[-1])
    assert (record["parameters"], record["macs"]) == (39_916_312, 13_852_682_216)

    changes = ["--image-size", "64", "--channels", "3", "--num-classes", "5", "--config.model.name=lenet"]
    code, out, _ = run(monkeypatch, capsys, "--config", DIGITS, *changes)
    assert code == 0
    record = json.loads(out.splitlines()[-1])
    assert [record[k] for k in keys[:-1]] == ["lenet", 64, 3, 5]

    code, out, _ = run(monkeypatch, capsys, "--config", f"{ROOT / 'configs' / 'jft.py'}:fc")
    assert code == 0
    for row in (" fc1 +4096 ", " fc2 +4096 ", " predictions +17000 "):  # paper, table 2
        assert re.search(row, " ".join(out.split("\n"))), row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments NAME --config --all is required; --help shows what there is"),
        ([DIGITS], "digits.py' is a file or folder; give the name of a network, such as xception"),
        (["xeption"], "unknown model.name 'xeption'; did you mean 'xception'"),
        (["xception", "--all"], "argument --all: not allowed with argument NAME"),
        (["--all", "xception"], "argument --all: not allowed with argument NAME"),
        (["xception", "--config", DIGITS], "argument --config: not allowed with argument NAME"),
        (["--all", "--config", DIGITS], "argument --config: not allowed with argument --all"),
        (["xception", "lenet"], "one NAME only, got 'lenet' too; --all compares all networks; --help shows"),
        (["xception", "--config.model.width", "1"], "'--config.model.width' has no value; write it in one word, --c"),
        (["--all", "--layers"], "argument --layers: not allowed with argument --all"),
        (["--all", "--picture", "x.png"], "argument --picture: not allowed with argument --all"),
        (["xception", "--picture", "x.txt"], r"x\.txt is no name of a picture; expected one that ends in .png"),
        (["xception", "--picture", "none/x.png"], "none/x.png cannot be written: No such file or directory; name"),
        (["xception", "--image-size", "0"], "argument --image-size: must be positive and at most .*, got '0'"),
        (["xception", "--image-size", "-5"], "argument --image-size: must be positive and at most .*, got '-5'"),
        (["xception", "--image-size", "big"], "argument --image-size: must be a number, or .*, got 'big'"),
        (["xception", "--image-size", "64,x"], "argument --image-size: must be .* height x width such as .* '64,x'"),
        (["xception", "--image-size", "0x64"], "argument --image-size: must be positive and at most .*, got '0x64'"),
        (["xception", "--image-size", "64x31"], "Xception needs images of at least 32 x 32 pixels, got 64 x 31"),
        (["xception", "--channels", "0"], "argument --channels: must be a positive integer, got '0'"),
        (["xception", "--image-size", "31"], "Xception needs images of at least 32 x 32 pixels, got 31 x 31"),
        (["--all", "--image-size", "64"], "Inception V3 needs images of at least 75 x 75 pixels, got 64 x 64"),
        (["xception", "--num-classes", "-1"], "num_classes .* must be in .* got -1"),
        (["xception", "--num-classes", "ten"], "argument --num-classes: invalid int value: 'ten'"),
        (
            ["xception", "--num-classes", "3", "--config.model.num_classes=4"],
            "argument --num-classes: not allowed with --config.model.num_classes",
        ),
        (["xception", "--config.model.widht=1"], "unknown recipe key 'model.widht'.* did you mean 'width'"),
        (["xception", "--config.model.width=wide"], "recipe key 'model.width' must be a number, got 'wide'"),
        (["xception", "--config.model.width=0"], "width must be positive, got 0"),
        (["xception", "--config.data.image_size=64"], "--config.data.image_size cannot be changed here; .*: model"),
        (["--config", DIGITS, "--config.epochs=3"], "--config.epochs cannot be changed here; only keys of: model"),
        (["xception", "--config.model.name=lenet"], "--config.model.name is for a recipe's network"),
        (["--all", "--config.model.output_stride=8"], r"'model.output_stride' with model.name='inception_v3'"),
        (["--config", "digts.py"], "no recipe file 'digts.py'"),
        (["xception", "--layres"], "unknown option '--layres'; did you mean '--layers'"),
    ],
)  # fmt: skip
def test_mistakes(monkeypatch, capsys, arguments, message):
    """One line, exit code 2, and nothing printed that looks like a result."""
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "")
    assert re.match(f"error: .*{message}", err), err
    assert err.count("\n") == 1


def test_a_mistake_from_the_shell_is_no_traceback():
    result = from_shell("xception", "--image-size", "16")
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch("error: Xception needs images of at least 32 x 32 pixels, got 16 x 16; .*\n", result.stderr)


def test_whoever_reads_the_output_may_go():
    """As with `| head`: there is no traceback."""
    command = [sys.executable, "-m", "xception_flax", "summary", "lenet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE


def test_a_full_disk_is_one_line():
    command = [sys.executable, "-m", "xception_flax", "summary", "lenet"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    said = "error: a file or standard output: No space left on device.\n"
    assert (result.returncode, result.stderr) == (2, said)
