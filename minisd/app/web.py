"""The web page of `minisd serve`: prompt, settings, step-by-step previews, and attention maps for each word.

Built with Gradio. Images are sent inline as data URLs, so nothing is written to disk, and the page loads no external
resources.
"""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from minisd.app.jobs import model_side
from minisd.app.provenance import Provenance
from minisd.app.web_drawing import Preview, Request, Result, draw, overlay
from minisd.pipeline.settings import SAMPLER_LABELS, SETTINGS, Settings
from minisd.pipeline.stable_diffusion import StableDiffusion

ERRORS = (ValueError, TypeError, FloatingPointError, MemoryError)  # errors with user-facing messages
PICTURE = -1  # the chip that shows the picture without a map
# the settings on the page, dropdowns last
SHOWN = {
    name: SETTINGS[name]
    for name in sorted(SETTINGS, key=lambda name: bool(SETTINGS[name].choices))
    if SETTINGS[name].label
}
FONT = ("system-ui", "sans-serif")


@dataclass(eq=False)
class Session:
    """The state of one open page: the number of its latest run, which cancels earlier ones, and its latest result."""

    run: int = 0
    result: Result | None = None


@dataclass(frozen=True, eq=False)
class Page:
    """Event handlers of the page, with no state other than the session."""

    sd: StableDiffusion
    provenance: Provenance

    def begin(self, session: Session) -> tuple[Any, ...]:
        """Start a new run, which cancels any earlier run of this page at its next step."""
        session.run += 1
        return session.run, _status("Waiting for other pages …"), gr.update(interactive=True)

    def stop(self, session: Session) -> None:
        """Cancel the current run, whether drawing or waiting."""
        session.run += 1

    def draw(
        self, session: Session, run: int, prompt: str, negative_prompt: str, seed: str, *values: Any
    ) -> Iterator[tuple[Any, ...]]:
        """Draw a picture, yielding updates (view, status, words, stop button) after each step and at the end.

        `values` are those of the settings on the page, in order.
        """
        same, idle = gr.skip(), gr.update(interactive=False)
        if session.run != run:
            yield same, _status("Stopped before the first step."), same, idle
            return
        settings = {name: _clean(value) for name, value in zip(SHOWN, values, strict=True)}
        try:
            for frame in draw(self.sd, self.provenance, Request(prompt, negative_prompt, seed, settings)):
                if isinstance(frame, Result):
                    session.result = frame
                    yield _view(frame.file, prompt), _finished(frame), _chips(frame), idle
                    return
                if session.run != run:
                    yield same, _status(f"Stopped after step {frame.call} of {frame.num_calls}."), same, idle
                    return
                clear = gr.update(choices=[], value=None, visible=False) if frame.call == 1 else same
                yield _view(_png(frame.picture), f"{prompt}, unfinished"), _progress(frame), clear, same
        except ERRORS as error:
            message = str(error)
            for name, setting in SHOWN.items():
                message = message.replace(name, setting.label.lower())
            yield same, _status("", error=message), same, idle

    def look(self, session: Session, chosen: int | None) -> tuple[str, str]:
        """Show or remove the overlay of a word's attention map; return updates (view, status)."""
        result = session.result
        if result is None or chosen is None:
            return gr.skip(), gr.skip()
        if not 0 <= chosen < len(result.words):
            return _view(result.file, result.name), _finished(result)
        word, maps = result.words[chosen], result.maps
        weights = maps.of(word)
        mean = f"mean of {maps.layers} layers, {maps.heads} heads and {result.num_calls} calls of the UNet"
        share = f"{weights.max():.1%} of the cross-attention is on this word"
        text = f"“{escape(word.text)}”: where it is brightest, {share} ({mean})."
        shown = _png(overlay(result.picture, weights))
        return _view(shown, f"attention to the word: {word.text}"), _finished(result, text)


def build(sd: StableDiffusion, provenance: Provenance) -> gr.Blocks:
    """Build the page for a model. Sessions share only the model; pictures are drawn one at a time."""
    page, side = Page(sd, provenance), model_side(sd)
    with gr.Blocks(title="minisd", analytics_enabled=False) as blocks:
        session, run = gr.State(Session()), gr.Number(visible=False)
        title = f"{escape(provenance.model)} · {side}×{side} · {provenance.device}, {provenance.precision}"
        gr.HTML(f'<div class="head"><h1>minisd</h1><span>{title}</span></div>', elem_id="head")
        with gr.Row():
            with gr.Column(scale=5, min_width=300):
                prompt = gr.Textbox(
                    "a fox in the snow", label="Prompt", info="(words:1.3) for more weight, [words] for less",
                    max_lines=6, elem_id="prompt",
                )  # fmt: skip
                negative = gr.Textbox(label="Negative prompt", max_lines=4, elem_id="negative")
                with gr.Row():
                    seed = gr.Textbox(label="Seed", placeholder="random", min_width=110, elem_id="seed")
                    settings = _settings(Settings.choose({}, sd.defaults))
                with gr.Row():
                    start = gr.Button("Draw", variant="primary", scale=3, min_width=120, elem_id="draw")
                    stop = gr.Button("Stop", interactive=False, scale=1, min_width=80, elem_id="stop")
            with gr.Column(scale=5, min_width=300):
                view = gr.HTML(_frame('<span class="hint">Your picture appears here.</span>'), elem_id="view")
                words = gr.Radio(
                    [], label="Which part of the picture attends to a word?", visible=False, elem_id="words"
                )
                status = gr.HTML(_status(""), elem_id="status")
        fields = [prompt, negative, seed, *settings]
        quiet: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "multiple", "api_visibility": "private"}
        begun = gr.on(
            [start.click, prompt.submit, negative.submit, seed.submit],
            page.begin, [session], [run, status, stop], queue=False, **quiet,
        )  # fmt: skip
        begun.then(page.draw, [session, run, *fields], [view, status, words, stop], concurrency_limit=1, **quiet)
        stop.click(page.stop, [session], None, queue=False, **quiet)
        words.input(page.look, [session, words], [view, status], queue=False, **quiet)
    return blocks


def _settings(defaults: Settings) -> list[Any]:
    """Create the widgets for the settings on the page, with the model's defaults."""
    widgets: list[Any] = []
    for name, setting in SHOWN.items():
        common: dict[str, Any] = {"label": setting.label, "elem_id": setting.label.lower()}
        if name == "sampler":
            choices = [
                (f"model default: {defaults.texts()[setting.png]}", ""),
                *((label, name) for name, label in SAMPLER_LABELS.items()),
            ]
            widgets.append(gr.Dropdown(choices, value="", min_width=300, **common))
        else:
            widgets.append(gr.Number(getattr(defaults, name), min_width=80, **common))
    return widgets


def launch(sd: StableDiffusion, provenance: Provenance, host: str, port: int, browser: bool) -> tuple[str, gr.Blocks]:
    """Serve the page in the background on this address only; return the URL and the server."""
    blocks = build(sd, provenance)
    _, address, _ = blocks.launch(
        server_name=f"[{host}]" if ":" in host else host,
        server_port=port,
        inbrowser=browser,
        prevent_thread_lock=True,
        share=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size=1,  # in bytes; the page accepts no uploads
        quiet=True,
        css_paths=Path(__file__).with_name("page.css"),
        theme=_theme(),
    )
    return address, blocks


def _theme() -> gr.themes.Base:
    """Return Gradio's default theme with system fonts."""
    blue = gr.themes.Color(*["#e6f2fa", "#cce4f4", "#99cae9", "#66afde", "#3395d3", *["#0072B2"] * 2, *["#005a8e"] * 4])
    base = gr.themes.Default(primary_hue=blue, neutral_hue="slate", font=FONT, font_mono=("ui-monospace", "monospace"))
    # Gradio's default gray for small text has too little contrast on white
    return base.set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500")


def _clean(value: Any) -> Any:
    """Convert a field's value: empty to None, and integral floats, which some browsers send, to int."""
    return int(value) if isinstance(value, float) and value.is_integer() else None if value == "" else value


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _url(file: bytes) -> str:
    return f"data:image/png;base64,{b64encode(file).decode()}"


def _frame(content: str) -> str:
    return f'<figure class="view">{content}</figure>'


def _view(file: bytes, alt: str) -> str:
    return _frame(f'<img src="{_url(file)}" alt="{escape(alt)}">')


def _status(text: str, error: str = "", notes: list[str] | None = None) -> str:
    alert = f'<div class="error" role="alert">{escape(error)}</div>' if error else ""
    more = "".join(f'<div class="note">{escape(note)}</div>' for note in notes or [])
    return f'<div class="status" role="status">{text}{alert}{more}</div>'


def _progress(frame: Preview) -> str:
    bar = f'<progress value="{frame.call}" max="{frame.num_calls}"></progress>'
    return _status(f"{bar}Step {frame.call} of {frame.num_calls}")


def _finished(result: Result, text: str = "") -> str:
    link = f'<a download="{escape(result.name)}" href="{_url(result.file)}">Download PNG</a>'
    row = f'<div class="row"><span>Seed {result.seed}, drawn in {result.seconds:.1f} s</span>{link}</div>'
    return _status(row + (f'<p class="hint">{text}</p>' if text else ""), notes=result.notes)


def _chips(result: Result) -> Any:
    choices = [("picture", PICTURE), *((word.text, i) for i, word in enumerate(result.words))]
    return gr.update(choices=choices, value=PICTURE, visible=bool(result.words))
