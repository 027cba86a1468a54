"""Opens a page in the browser to try a network: an image in, its classes and the evidence for one of them out."""

import html
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xception_flax.commands import cli, images
from xception_flax.display import console, heat
from xception_flax.host.libraries import check_extra
from xception_flax.host.signals import StopRequest
from xception_flax.inference.explaining import PREDICTED, Explainer
from xception_flax.inference.predictor import Predictor
from xception_flax.text import naming
from xception_flax.text.errors import UserError
from xception_flax.text.naming import repeated
from xception_flax.text.sizes import shown

EXAMPLES = """\
  xception-flax demo runs/photos
  xception-flax demo keras:xception --port 8000 --no-browser"""

HOST, PORT = "127.0.0.1", 7860
TOP = 5
MAX_FILE_SIZE = "200mb"
OUT_OF_MEMORY = "Take a smaller image, or end what else uses the memory."

STYLE = """
.gradio-container {max-width: 1080px !important; margin: 0 auto !important}
.network h1 {font-size: 1.4rem; font-weight: 600; margin: 1rem 0 .1rem; overflow-wrap: anywhere}
.network p, .hint {color: var(--body-text-color-subdued); margin: 0; overflow-wrap: anywhere}
.hint {padding: .5rem 0}
.hint bdi {color: inherit}
.picture img {width: 100%; height: 100%; object-fit: contain}
.answer {padding: .25rem 0 .5rem}
.answer .row {display: flex; justify-content: space-between; gap: 1rem; margin-top: .7rem}
.answer .row bdi {overflow-wrap: anywhere; max-height: 4.5em; overflow-y: auto}
.answer .row span {font-variant-numeric: tabular-nums; white-space: nowrap}
.answer .bar {height: 4px; border-radius: 2px; margin-top: .25rem; background: var(--border-color-primary)}
.answer .bar div {height: 100%; border-radius: 2px; background: var(--color-accent)}
.answer .first {font-weight: 600}
.problem {border-left: 3px solid #c2410c; padding: .4rem .8rem; overflow-wrap: anywhere}
"""


class Answer(NamedTuple):
    """What a network says of an image.

    Attributes:
      classes: the most likely ones in words, with their probabilities, the best first.
      explained: the class, in words, that the picture is about.
      pixels: what the network took, uint8 `[H, W, channels]`.
      picture: these with Grad-CAM over them, uint8 `[H, W, 3]`.
    """

    classes: list[tuple[str, float]]
    explained: str
    pixels: np.ndarray
    picture: np.ndarray


def main(argv: list[str]) -> int:
    parser = cli.parser("xception-flax demo", __doc__, EXAMPLES, hosts=False)
    images.add_network(parser)
    images.add_word(parser)
    parser.add_argument(
        "--host",
        default=HOST,
        metavar="ADDRESS",
        help=f"{HOST} (default): for this machine only; 0.0.0.0: whoever reaches this machine can use the page",
    )
    parser.add_argument("--port", type=cli.positive, default=PORT, metavar="N", help=f"of the page ({PORT})")
    parser.add_argument("--no-browser", action="store_true", help="print the address only")
    parser.set_defaults(batch_size=1)
    arguments = parser.parse_args(argv)
    check_extra("demo", ("gradio", "matplotlib"), "the page")
    check_address(arguments.host, arguments.port)
    cli.start(arguments)
    with cli.out_of_memory("Take a smaller --image-size, or another network."):
        predictor = images.load(arguments.source, arguments)
        explainer = create_explainer(predictor)
        with console.waiting("compiling the network"):
            list(explainer.stream([np.zeros(predictor.preprocessing.image_shape, np.uint8)]))
    with tempfile.TemporaryDirectory(prefix="xception_flax_demo_") as folder:  # of what is uploaded
        _serve(explainer, images.title(arguments.source, predictor), arguments, folder)
    return 0


def create_explainer(predictor: Predictor) -> Explainer:
    """Returns what `ask` asks: Grad-CAM at every stage in one program, so that no choice has to be compiled."""
    return Explainer(predictor, stages=tuple(predictor.model.strides))


def check_address(host: str, port: int) -> None:
    """Raises UserError unless a page can be opened there."""
    if port > 65_535:
        raise UserError(f"--port must be at most 65,535, got {port}.")
    try:
        socket.create_server((host, port)).close()
    except socket.gaierror:
        raise UserError(f"--host {naming.shown(host)} is no address of this machine; expected {HOST}.") from None
    except OSError as error:
        raise UserError(
            f"no page can be opened at {naming.shown(host)}, port {port}: {error.strerror}; take another --port."
        ) from None


def class_words(predictor: Predictor) -> list[str]:
    """Returns the classes in words that can be shown. Where two have the same words, their codes are added."""
    names = predictor.class_names
    words = predictor.class_descriptions or names
    if repeated(words) is not None:
        words = [
            word if words.count(word) == 1 else f"{word} ({name})" for word, name in zip(words, names, strict=True)
        ]
    return [naming.shown(word) for word in words]


def ask(explainer: Explainer, image: str | Path, number: int = PREDICTED, stage: str | None = None) -> Answer:
    """Returns what the network says of an image.

    Args:
      explainer: of the network.
      image: the path of a file.
      number: of the class to explain; `PREDICTED` for the most likely one.
      stage: of Grad-CAM, one of the explainer's; None for its last one.

    Raises:
      UserError: the image cannot be read, or its output is not finite.
    """
    with cli.out_of_memory(OUT_OF_MEMORY):
        [(_, found)] = explainer.stream([Path(image)], number)
    if isinstance(found, UserError):
        raise found
    words = class_words(explainer.predictor)
    order = np.argsort(-found.probabilities, kind="stable")[:TOP]
    classes = [(words[i], float(found.probabilities[i])) for i in order]
    if found.number not in order:  # the one that was asked for is shown in any case
        classes.append((words[found.number], float(found.probabilities[found.number])))
    pixels = np.uint8(np.round(found.pixels.clip(0, 255)))
    return Answer(classes, words[found.number], pixels, heat.warm(pixels, found.maps[stage or explainer.stages[-1]]))


def table(classes: list[tuple[str, float]]) -> str:
    """Returns classes and their probabilities as HTML, in which the names are text."""
    rows = []
    for i, (name, share) in enumerate(classes):
        words = f"<bdi>{html.escape(name)}</bdi><span>{console.percent(share)}</span>"
        bar = f'<div class="bar"><div style="width: {100 * share:.2f}%"></div></div>'
        rows.append(f'<div class="row{" first" if not i else ""}">{words}</div>{bar}')
    return f'<div class="answer">{"".join(rows)}</div>'


def problem(message: str) -> str:
    """Returns a message as HTML."""
    return f'<div class="problem" role="alert">{html.escape(naming.harmless(message))}</div>'


def respond(
    explainer: Explainer, image: str | None, number: int, stage: str
) -> tuple[str, np.ndarray | None, np.ndarray | None, str]:
    """Returns what the page shows: the classes or a message, two pictures, and the caption of the second."""
    if not image:
        return '<p class="hint">Drop an image to see its classes.</p>', None, None, ""
    try:
        answer = ask(explainer, image, number, stage)
    except UserError as error:
        return problem(str(error)), None, None, ""
    caption = f"Grad-CAM, {stage}: bright is evidence for <bdi>{html.escape(answer.explained)}</bdi>."
    pixels = np.broadcast_to(answer.pixels[..., :3], answer.picture.shape)
    return table(answer.classes), pixels, answer.picture, f'<p class="hint">{caption}</p>'


def create_page(explainer: Explainer, title: str) -> Any:
    """Returns the page, a `gradio.Blocks`. Nothing is sent to or fetched from elsewhere."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read by the import
    import gradio

    predictor = explainer.predictor
    size = shown(predictor.preprocessing.image_size)
    what = f"{type(predictor.model).__name__}, {len(predictor.class_names):,} classes, {size} pixels"
    choices = [("the most likely one", PREDICTED), *((word, i) for i, word in enumerate(class_words(predictor)))]
    with gradio.Blocks(title="xception_flax", analytics_enabled=False) as page:
        gradio.HTML(f'<div class="network"><h1>{html.escape(title)}</h1><p>{html.escape(what)}</p></div>')
        with gradio.Row():
            with gradio.Column(scale=2, min_width=300):
                # Not `gradio.Image`, which decodes: the network is to see the same pixels as by `predict`.
                file = gradio.File(label="Image", type="filepath", height=180)
                number = gradio.Dropdown(choices, value=PREDICTED, label="Class to explain", filterable=True)
                stages = explainer.stages
                stage = gradio.Dropdown(list(stages), value=stages[-1], label="Stage of Grad-CAM")
            with gradio.Column(scale=3, min_width=300):
                classes = gradio.HTML(respond(explainer, None, PREDICTED, stages[-1])[0])
                with gradio.Row():
                    options = dict(format="png", interactive=False, buttons=["download", "fullscreen"], height=280)
                    options["elem_classes"] = "picture"
                    seen = gradio.Image(label="What the network sees", min_width=200, **options)
                    picture = gradio.Image(label="Evidence", min_width=200, **options)
                caption = gradio.HTML()

        def show(*values: Any) -> tuple:
            return respond(explainer, *values)

        gradio.on(
            [file.change, number.change, stage.change],
            show,
            [file, number, stage],
            [classes, seen, picture, caption],
            api_visibility="private",
            show_progress="minimal",
            trigger_mode="always_last",
        )
    return page


def _serve(explainer: Explainer, title: str, arguments: Any, folder: str) -> None:
    os.environ["GRADIO_TEMP_DIR"] = folder
    page = create_page(explainer, title)
    import gradio

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # of the machine
    with StopRequest() as stop:
        try:
            _, address, _ = page.launch(
                server_name=arguments.host,
                server_port=arguments.port,
                prevent_thread_lock=True,
                inbrowser=not arguments.no_browser,
                share=False,
                ssr_mode=False,
                mcp_server=False,
                enable_monitoring=False,
                run_history=False,
                footer_links=[],
                quiet=True,
                max_file_size=MAX_FILE_SIZE,
                theme=gradio.themes.Base(primary_hue="slate", neutral_hue="slate", **fonts),
                css=STYLE,
            )
        except OSError as error:  # somebody else took the port meanwhile
            raise UserError(f"no page can be opened at port {arguments.port}: {error}") from None
        print(f"\n  {address}\n  Ctrl-C ends it.", flush=True)
        if arguments.host != HOST:
            print("  Whoever reaches this machine can use the page: there is no password.", flush=True)
        while stop.signal is None:
            time.sleep(0.2)
        page.close(verbose=False)
