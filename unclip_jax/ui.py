"""A web page over `UnCLIP`: a tab for each thing that the stack can do (`forms`), one drawing at a time.

Made with gradio, the extra `ui`. It needs no network: nothing is told to anybody, and no file is from elsewhere.
"""

import dataclasses
import html
import ipaddress
import json
import os
import socket
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

import unclip_jax
from unclip_jax.data.images import MAX_BYTES
from unclip_jax.diffusion.sample import SAMPLERS
from unclip_jax.errors import UserError
from unclip_jax.forms import draw, offered, tabs
from unclip_jax.pipeline import UnCLIP
from unclip_jax.settings import PRIORS, Settings

SHOWN = ("prior", "prior_guidance", "guidance", "steps", "sampler")  # settings; the others are folded away
MAX_WAITING = 16  # drawings


def serve(
    model: str = "shapes",
    host: str = "127.0.0.1",
    port: int = 7860,
    *,
    low_memory: bool = False,
    dtype: str | None = None,
) -> None:
    """Shows the page of a stack at http://host:port, for ever.

    Args:
      model, low_memory, dtype: of `UnCLIP.load`.

    Raises:
      UserError: gradio is missing, the address cannot be listened on, or no such stack.
    """
    local = _check_address(host, port)
    with tempfile.TemporaryDirectory(prefix="unclip-ui-", ignore_cleanup_errors=True) as folder:  # of uploads, drawings
        own = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), host, "localhost", "127.0.0.1"]
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        os.environ["no_proxy"] = ",".join(filter(None, own))  # gradio asks for its own page, to see whether it is there
        _gradio()
        pipe = UnCLIP.load(model, low_memory=low_memory, dtype=dtype)
        name = os.path.basename(os.path.normpath(model))  # the folders above it are nobody's business
        blocks = page(pipe, name)
        plain = dict(share=False, quiet=True, ssr_mode=False, run_history=False, enable_monitoring=False)
        more = dict(prevent_thread_lock=True, max_file_size=MAX_BYTES, footer_links=[], **plain)
        if not local:
            warnings.warn(f"anyone who can reach port {port} of this machine can use the page", stacklevel=2)
        blocks.launch(server_name=host, server_port=port, **more)
        print(f"{name} is at http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()


def page(pipe: UnCLIP, model: str):
    """The page as gradio's Blocks; what each tab's button does is an endpoint of the tab's name."""
    gr = _gradio()
    with gr.Blocks(title=f"unclip_jax: {model}", analytics_enabled=False, delete_cache=(600, 86_400)) as blocks:
        for tab, fields in tabs(pipe).items():
            settings = offered(pipe, tab)
            shown = [name for name in SHOWN if name in settings]
            with gr.Tab(tab), gr.Row():
                with gr.Column():
                    inputs = {name: _component(gr, kind, options) for name, (kind, options) in fields.items()}
                    with gr.Row():
                        inputs |= {name: _field(gr, name, settings[name]) for name in shown}
                    with gr.Accordion("more settings", open=False):
                        inputs |= {name: _field(gr, name, settings[name]) for name in settings if name not in shown}
                    button = gr.Button("Draw", variant="primary")
                with gr.Column():
                    tools = dict(buttons=["download", "download_all", "fullscreen"], interactive=False)
                    pictures = gr.Gallery(label="pictures", format="png", columns=4, object_fit="contain", **tools)
                    outputs = [pictures, gr.Number(label="drawn with the seed"), gr.JSON(label="drawn with")]
            own = dict(api_name=tab.lower(), concurrency_id="device", concurrency_limit=1)  # the device is one for all
            button.click(_drawer(gr, pipe, model, tab, list(inputs)), list(inputs.values()), outputs, **own)
    return blocks.queue(max_size=MAX_WAITING, api_open=False)


def _drawer(gr, pipe: UnCLIP, model: str, tab: str, names: Sequence[str]) -> Callable:
    """What a tab's button does with its fields' values, in the order of `names`; mistakes and warnings are shown."""

    def run(progress=gr.Progress(track_tqdm=True), *values):  # noqa: B008 (where gradio finds it)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                drawn, facts = draw(pipe, tab, dict(zip(names, values, strict=True)))
        except UserError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from None
        except Exception as error:
            if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            what = "not enough memory. Fix: draw fewer at once, or start the page with --low-memory"
            raise gr.Error(what, print_exception=False) from None
        for warning in caught:
            gr.Warning(html.escape(str(warning.message)))
        facts = {"unclip_jax": unclip_jax.__version__, "model": model, "tab": tab, **facts}
        return [(_tagged(image, {"label": label, **facts}), label) for image, label in drawn], facts["seed"], facts

    return run


def _tagged(image: np.ndarray, facts: dict) -> Image.Image:
    """A picture whose PNG will say how it was drawn, as those of the commands do."""
    picture = Image.fromarray(image)
    picture.info = {k: v if isinstance(v, str) else json.dumps(v, sort_keys=True) for k, v in facts.items()}
    return picture


def _field(gr, name: str, default):
    """An empty field for a setting, which tells what is drawn with where it is left so."""
    kind = {field.name: field.type for field in dataclasses.fields(Settings)}[name]
    default = "none" if default is None else str(default)
    if kind.startswith("str"):
        choices = PRIORS if name == "prior" else SAMPLERS
        return _component(gr, "Dropdown", dict(choices=[(f"({default})", ""), *choices], value="", label=name))
    if kind.startswith("tuple"):
        return gr.Textbox(label=f"{name}: low,high", placeholder=default)
    return _component(gr, "Number", dict(label=name, value=None, placeholder=default))


def _component(gr, kind: str, options: Mapping):
    """One of gradio's, whose value reaches `draw` as it was sent, to be checked there.

    gradio tells of a number out of a slider's range, and of a file that is no picture, by a traceback on the terminal,
    and of the latter by no word on the page; and it decodes pictures of any size.
    """
    made = getattr(gr, kind)(**options)
    if kind == "Image":
        made.preprocess = lambda sent: sent and sent.path
    elif kind == "ImageEditor":  # a browser sends what was painted ahead, under an id
        made.preprocess = lambda sent: sent and _canvas(made.blob_storage.pop(sent.id, sent))
    elif kind != "Textbox":  # which makes text of anything
        made.preprocess = lambda sent: sent
    return made


def _canvas(sent) -> dict:
    """The files of an editor, each as its bytes or its path."""
    files = [file.path if hasattr(file, "path") else file for file in (sent.background, *sent.layers)]
    return {"background": files[0], "layers": files[1:]}


def _check_address(host: str, port: int) -> bool:
    """Whether only this machine can reach it; UserError for an address that cannot be listened on."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as there:
            there.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            there.bind(address)
    except (OSError, UnicodeError, OverflowError) as e:
        what = f"nothing can listen on port {port} of {host!r} ({getattr(e, 'strerror', None) or e})"
        raise UserError(what, "give another --port, or another --host") from e
    return ipaddress.ip_address(address[0].partition("%")[0]).is_loopback


def _gradio():
    try:
        import gradio
    except ImportError as e:
        raise UserError(f"the web page needs the package {e.name}", 'pip install "unclip_jax[ui]"') from e
    return gradio
