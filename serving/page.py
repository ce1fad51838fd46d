"""The page: everything that a request may say as a form, drawn by the service of the same process.

What is seen on it belongs to one visit. Files that the browser loads lie in a folder that only this user can read; they
are removed when they are as old as results may become, and the folder with the process.
"""
import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from pipeline.palette import THEMES
from pipeline.styles import DEFAULT, STRONGEST, read_styles
from sampling.flags import AXES, SAMPLERS
from serving.keys import Account, Keys
from serving.orders import Model
from serving.service import Service
from serving.visit import STARTS, Form, Visit

TITLE = "Images from text"
NONE = "none"
STYLE = """
footer {display: none !important}
#status {min-height: 2.5em}
@media (max-width: 640px) {.gradio-container {padding: 6px !important}}
"""
HELP = ("Describe an image and press Enter. Words can be weighed, as in `a (red:1.3) apple`, and `{a|b}` draws both. "
        "Prompts are checked before anything is drawn. Nothing of a visit is kept.")


def mount_page(app: FastAPI) -> FastAPI:
    """The application with the page at its root; with keys, behind a name and a key."""
    folder = tempfile.mkdtemp(prefix="page-")  # readable by its owner only
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"], os.environ["GRADIO_ANALYTICS_ENABLED"] = folder, "False"
    import gradio as gr
    service: Service = app.state.service
    keys: Keys = app.state.keys
    blocks = build_page(service, keys, Path(folder))

    def known(name: str, key: str) -> bool:
        account = keys.find(key)
        return account is not None and account.name == name

    fonts = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # none is fetched from elsewhere
    return gr.mount_gradio_app(app, blocks, path="/", auth=known if keys.needed else None, show_error=False,
                               theme=gr.themes.Default(font=fonts[0], font_mono=fonts[1]), css=STYLE, ssr_mode=False,
                               auth_message="The name and the key that you were given.")


def build_page(service: Service, keys: Keys, folder: Path) -> Any:
    """The page as Gradio's blocks."""
    import gradio as gr
    visit = Visit(service, keys, folder)

    def account_of(request: gr.Request) -> Account:
        account = keys.named(request.username) if keys.needed else keys.find(None)
        if account is None:
            raise PermissionError
        return account

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(60, int(service.settings.keep))) as blocks:
        gr.Markdown(f"# {TITLE}\n{HELP}")
        job, seen, made, chosen = gr.State(""), gr.State([]), gr.State(0), gr.State(-1)
        with gr.Row():
            with gr.Column(min_width=300):
                fields = form_fields()
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", elem_id="draw")
                    cancel = gr.Button("Cancel", variant="stop", elem_id="cancel")
            with gr.Column(min_width=300):
                status = gr.Markdown("", elem_id="status")
                gallery = gr.Gallery(label="Images", elem_id="images", columns=2, height=420, object_fit="contain",
                                     preview=False, format="png", interactive=False)
                settings = gr.JSON(label="Settings of the chosen image", elem_id="settings")
                with gr.Row():
                    restart = gr.Button("Start from it", elem_id="restart")
                    repaint = gr.Button("Paint on it", elem_id="repaint")
        with gr.Accordion("This visit", open=False):
            history = gr.Gallery(label="Every image of this visit", columns=8, format="png", interactive=False)
        wire_drawing(visit, account_of, fields, (job, seen, made), (draw, cancel), (status, gallery, settings, history))
        wire_choice(fields, (seen, made, chosen), (gallery, history), settings, (restart, repaint))
        blocks.load(lambda: defaults_of(service.model), None,
                    [fields[name] for name in ("width", "height", "steps", "guidance")], api_visibility="private")
    return blocks


def form_fields() -> dict[str, Any]:
    """The components of the form by the names of `Form`."""
    import gradio as gr
    found: dict[str, Any] = {}
    found["prompt"] = gr.Textbox(label="Prompt", lines=1, max_lines=6, autofocus=True, elem_id="prompt",
                                 placeholder="a red apple")
    found["negative"] = gr.Textbox(label="Not", placeholder="what guidance pushes away from", elem_id="negative")
    with gr.Row():
        found["style"] = gr.Dropdown(list(read_styles(DEFAULT)), label="Styles", multiselect=True, elem_id="style")
        found["style_strength"] = gr.Slider(0, STRONGEST, 1, step=0.05, label="Strength of the styles")
        found["palette"] = gr.Dropdown([NONE, *THEMES], value=NONE, label="Palette", allow_custom_value=True,
                                       elem_id="palette", info="a theme, or colours such as #1b3a4b,#f2c14e:0.5")
    with gr.Row():
        found["count"] = gr.Slider(1, 16, 4, step=1, label="Number", elem_id="count")
        found["seed"] = gr.Number(-1, label="Seed", precision=0, elem_id="seed", info="-1: another one every time")
    with gr.Accordion("More settings", open=False):
        found["steps"] = gr.Slider(1, 150, 20, step=1, label="Steps", elem_id="steps")
        found["guidance"] = gr.Slider(1, 20, 3, step=0.1, label="Guidance", elem_id="guidance")
        found["sampler"] = gr.Dropdown(["default", *SAMPLERS], value="default", label="Sampler", elem_id="sampler")
        with gr.Row():
            found["width"] = gr.Number(64, label="Width", precision=0, elem_id="width")
            found["height"] = gr.Number(64, label="Height", precision=0, elem_id="height")
        found["palette_only"] = gr.Checkbox(False, label="No colours but those of the palette")
        found["exact"] = gr.Checkbox(False, label="Exact: the same bytes again, one image at a time")
        found["metadata"] = gr.Checkbox(True, label="Leave the settings in the files")
    found["start"] = gr.Radio(list(STARTS), value=STARTS[0], label="Start from", elem_id="start")
    with gr.Group(visible=False) as of_image:
        found["image"] = gr.Image(label="Image", type="pil", image_mode="RGB", elem_id="image", format="png")
        found["strength"] = gr.Slider(0.05, 1, 0.6, step=0.05, label="Strength: how much may change")
    with gr.Group(visible=False) as of_paint:
        found["painted"] = gr.ImageEditor(label="Paint over what is to be drawn anew", type="pil", image_mode="RGBA",
                                          brush=gr.Brush(colors=["#ffffff"], color_mode="fixed"), elem_id="painted",
                                          format="png")
    with gr.Group(visible=False) as of_grid:
        for axis, text in (("across", "steps"), ("down", NONE)):
            with gr.Row():
                found[f"{axis}_name"] = gr.Dropdown([NONE, *AXES], value=text, label=f"What changes {axis}")
                found[f"{axis}_values"] = gr.Textbox(label="Values", placeholder="5,10,20")
    groups = {STARTS[1]: of_image, STARTS[2]: of_paint, STARTS[3]: of_grid}
    found["start"].change(lambda start: [gr.update(visible=start == name) for name in groups], found["start"],
                          list(groups.values()), queue=False)
    return found


def defaults_of(model: Model | None) -> list[Any]:
    """The form at the settings of the system."""
    import gradio as gr
    assert model is not None
    height, width = model.size
    sampling = model.config.sampling
    return [gr.update(value=width, step=model.multiple), gr.update(value=height, step=model.multiple),
            gr.update(value=sampling.steps), gr.update(value=sampling.guidance.scale)]


def wire_drawing(visit: Visit, account_of: Callable, fields: dict[str, Any], states: tuple, buttons: tuple,
                 outputs: tuple) -> None:
    """Draw on Enter and on the button; cancel."""
    import gradio as gr
    (job, seen, made), (draw, cancel), (status, gallery, settings, history) = states, buttons, outputs
    names = list(fields)

    async def on_draw(request: gr.Request, seen: list, *values: Any) -> Any:
        form = Form(**dict(zip(names, values)))
        async for state in visit.draw(form, account_of(request), seen):
            yield (state.job, state.seen, state.made, state.text, state.images, state.settings,
                   [(path, text) for path, text, _ in state.seen])

    def on_cancel(request: gr.Request, name: str) -> None:
        visit.cancel(name, account_of(request))

    for trigger in (draw.click, fields["prompt"].submit, fields["negative"].submit):
        trigger(on_draw, [seen, *fields.values()], [job, seen, made, status, gallery, settings, history],
                show_progress="hidden", concurrency_limit=None, api_visibility="private", trigger_mode="once")
    cancel.click(on_cancel, job, None, queue=False, api_visibility="private")


def wire_choice(fields: dict[str, Any], states: tuple, galleries: tuple, settings: Any, buttons: tuple) -> None:
    """Settings of a chosen image, and images to start from."""
    import gradio as gr
    (seen, made, chosen), (gallery, history), (restart, repaint) = states, galleries, buttons

    def of_gallery(event: gr.SelectData, seen: list, made: int) -> tuple[int, Any]:
        place = len(seen) - made + event.index
        return (place, seen[place][2]) if event.index < made else (-1, None)  # a preview has no settings yet

    def of_history(event: gr.SelectData, seen: list) -> tuple[int, Any]:
        return event.index, seen[event.index][2]

    gallery.select(of_gallery, [seen, made], [chosen, settings], api_visibility="private")
    history.select(of_history, seen, [chosen, settings], api_visibility="private")

    def path_of(seen: list, chosen: int) -> str | None:
        path = seen[chosen][0] if -1 <= chosen < len(seen) and seen else None  # the newest one where none was chosen
        return path if path and Path(path).exists() else None

    restart.click(lambda seen, chosen: (STARTS[1], path_of(seen, chosen)), [seen, chosen],
                  [fields["start"], fields["image"]], api_visibility="private")
    repaint.click(lambda seen, chosen: (STARTS[2], path_of(seen, chosen)), [seen, chosen],
                  [fields["start"], fields["painted"]], api_visibility="private")
