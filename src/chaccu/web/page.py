"""`create_page`: the chat page, laid out and wired.

Invariants: the page holds no model and no state of its own between requests; every visitor has one transcript, in the session;
a failure of one model leaves the page and the other models usable. The list of models is the gateway's, asked for again and
again, so a model that comes back is offered again.
"""

from __future__ import annotations

import contextlib
import html
import os
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from chaccu.client import ChatClient, ChatError, Sampling
from chaccu.errors import MissingDependencyError
from chaccu.web.config import WebConfig
from chaccu.web.messages import render_messages, turn_at
from chaccu.web.theme import read_asset
from chaccu.web.transcript import Transcript, Turn, stopped, stream_turn

_EXAMPLES = (
    "Who are you?",
    "Explain in three sentences why the sky is blue.",
    "Write a Python function that reverses a string.",
    "Give me a plan for a rainy Sunday.",
)


class Availability(msgspec.Struct, frozen=True):
    """The models on offer, and what went wrong when they could not be asked for."""

    models: tuple[str, ...]
    problem: str = ""


class ChatActions:
    """What the page does when something is pressed; the layout below ties its methods to the controls."""

    def __init__(self, config: WebConfig) -> None:
        self._config = config
        self._client = ChatClient(config.gateway_url, config.api_key, timeout_s=config.timeout_s)

    async def refresh(self, chosen: str | None, known: Availability | None) -> tuple[Any, Any, Any]:
        """The model picker, the status line and what they show; nothing moves on the page when nothing has changed."""
        import gradio as gr

        now = await self._ask_models()
        if now == known:
            return gr.skip(), gr.skip(), gr.skip()
        chosen = chosen or next(iter(now.models), None)
        choices = [(name, name) for name in now.models]
        if chosen and chosen not in now.models:
            choices.append((f"{chosen} (away)", chosen))
        return gr.Dropdown(choices=choices, value=chosen), _status(now), now

    async def _ask_models(self) -> Availability:
        try:
            names = await self._client.models()
        except ChatError as error:
            return Availability((), error.message)
        return Availability(tuple(names), "" if names else f"No model is served at {self._client.base_url} now.")

    def ask(self, text: str, model: str | None, turns: Transcript) -> tuple[Transcript, list[dict[str, Any]], str]:
        """Begin a turn with `text`; a blank text or no model leaves everything as it is."""
        import gradio as gr

        if not text.strip():
            return turns, render_messages(turns), text
        if not model:
            gr.Warning("No model is served yet. Start one with: chaccu worker", title="No model")
            return turns, render_messages(turns), text
        turns = (*turns, Turn(prompt=text, model=model))
        return turns, render_messages(turns), ""

    def ask_again(self, index: int, model: str | None, turns: Transcript, text: str | None = None) -> Transcript:
        """Begin the turn of message `index` again, with the model now chosen and, if given, another text; later turns go."""
        if not turns:
            return turns
        number = turn_at(turns, index)
        old = turns[number]
        return (*turns[:number], Turn(prompt=old.prompt if text is None else text, model=model or old.model))

    async def answer(
        self, turns: Transcript, system: str, temperature: float, max_tokens: float
    ) -> AsyncIterator[tuple[Transcript, list[dict[str, Any]]]]:
        """The transcript and its messages while the last turn is answered; does nothing when no answer is awaited."""
        if not turns or turns[-1].state != "waiting":
            yield turns, render_messages(turns)
            return
        sampling = Sampling(temperature=temperature, max_tokens=int(max_tokens))
        async with contextlib.aclosing(stream_turn(self._client, turns, system=system, sampling=sampling)) as states:
            async for state in states:
                yield state, render_messages(state)

    def stop(self, turns: Transcript) -> tuple[Transcript, list[dict[str, Any]]]:
        """Say in the conversation that its reader stopped the answer."""
        turns = stopped(turns)
        return turns, render_messages(turns)

    def clear(self) -> tuple[Transcript, list[dict[str, Any]]]:
        """A new conversation."""
        return (), []


class _Controls(msgspec.Struct, frozen=True):
    """The controls of the page (Gradio components)."""

    model: Any
    status: Any
    chat: Any
    text: Any
    new: Any
    system: Any
    temperature: Any
    max_tokens: Any


def create_page(config: WebConfig) -> Any:
    """The chat page, a `gradio.Blocks`, not yet served. Raises `MissingDependencyError` without Gradio."""
    gr = _import_gradio()
    with gr.Blocks(title="Chaccu", fill_height=True, analytics_enabled=False) as page:
        controls = _lay_out(gr, config)
        _wire(gr, config, page, controls)
    return page


def _import_gradio() -> Any:
    # Gradio reads these while it is imported; neither it nor its hub client may call home.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import gradio
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise MissingDependencyError("gradio", extra="web", needed_for="The chat page") from error
    return gradio


def _lay_out(gr: Any, config: WebConfig) -> _Controls:
    with gr.Row(elem_id="chaccu-head", equal_height=True):
        gr.HTML(f"<h1>{read_asset('mark.svg')}<span>Chaccu</span></h1>", elem_id="chaccu-brand")
        model = gr.Dropdown(
            choices=[], label="Model", show_label=False, container=False, filterable=False, elem_id="chaccu-model", scale=0
        )
        new = gr.Button("New chat", size="sm", elem_id="chaccu-new", scale=0)
    status = gr.HTML(_status(Availability(())), elem_id="chaccu-status")
    with gr.Sidebar(position="right", open=False, label="Settings", elem_id="chaccu-settings"):
        gr.HTML("<h2>Settings</h2>")
        system = gr.Textbox(label="System prompt", lines=4, max_lines=12, placeholder="How the model should behave")
        temperature = gr.Slider(
            0, 2, value=config.temperature, step=0.05, label="Temperature", info="0 always takes the likeliest word"
        )
        max_tokens = gr.Slider(1, 4096, value=config.max_tokens, step=1, label="Max tokens", info="where an answer is cut off")
    chat = gr.Chatbot(
        label="Conversation",
        show_label=False,
        container=False,
        elem_id="chaccu-chat",
        height="100%",
        scale=1,
        layout="bubble",
        buttons=["copy", "copy_all"],
        editable="user",
        placeholder=f'<div class="chaccu-empty">{read_asset("mark.svg")}<p>Ask something, or pick a question.</p></div>',
        examples=[{"text": text} for text in _EXAMPLES],
        latex_delimiters=[{"left": "$$", "right": "$$", "display": True}, {"left": "\\(", "right": "\\)", "display": False}],
        allow_tags=False,
    )
    text = gr.Textbox(
        label="Message",
        show_label=False,
        container=False,
        placeholder="Write a message",
        lines=1,
        max_lines=8,
        autofocus=True,
        submit_btn=True,
        elem_id="chaccu-text",
    )
    return _Controls(model, status, chat, text, new, system, temperature, max_tokens)


def _wire(gr: Any, config: WebConfig, page: Any, at: _Controls) -> None:
    actions = ChatActions(config)
    turns = gr.State(())
    known = gr.State(None)
    hidden = {"show_progress": "hidden", "api_visibility": "private"}
    quick = {**hidden, "queue": False}

    refreshing = {"fn": actions.refresh, "inputs": [at.model, known], "outputs": [at.model, at.status, known], **quick}
    page.load(**refreshing)
    gr.Timer(config.refresh_s).tick(**refreshing)

    def write(begun: Any) -> Any:
        """The steps of every answer: show Stop, stream, show Send again."""
        begun.then(lambda: gr.Textbox(submit_btn=False, stop_btn=True), None, at.text, **quick)
        writing = begun.then(
            actions.answer,
            [turns, at.system, at.temperature, at.max_tokens],
            [turns, at.chat],
            concurrency_limit=None,
            **hidden,
        )
        writing.then(lambda: gr.Textbox(submit_btn=True, stop_btn=False), None, at.text, **quick)
        return writing

    def retry(chosen: str | None, known_turns: Transcript, event: gr.RetryData) -> tuple[Transcript, list[dict[str, Any]]]:
        again = actions.ask_again(_index(event), chosen, known_turns)
        return again, render_messages(again)

    def edit(chosen: str | None, known_turns: Transcript, event: gr.EditData) -> tuple[Transcript, list[dict[str, Any]]]:
        again = actions.ask_again(_index(event), chosen, known_turns, text=str(event.value))
        return again, render_messages(again)

    def example(
        chosen: str | None, known_turns: Transcript, event: gr.SelectData
    ) -> tuple[Transcript, list[dict[str, Any]], str]:
        return actions.ask(event.value["text"], chosen, known_turns)

    # Gradio finds the event's argument by its annotation, which the postponed evaluation has made a string.
    for function, kind in ((retry, gr.RetryData), (edit, gr.EditData), (example, gr.SelectData)):
        function.__annotations__["event"] = kind

    asked = [turns, at.chat, at.text]
    answers = [
        write(at.text.submit(actions.ask, [at.text, at.model, turns], asked, **quick)),
        write(at.chat.retry(retry, [at.model, turns], [turns, at.chat], **quick)),
        write(at.chat.edit(edit, [at.model, turns], [turns, at.chat], **quick)),
        write(at.chat.example_select(example, [at.model, turns], asked, **quick)),
    ]

    def end(trigger: Any, action: Any, inputs: list[Any]) -> None:
        ended = trigger(None, None, None, cancels=answers, api_visibility="private")
        ended.then(action, inputs, [turns, at.chat], **quick).then(
            lambda: gr.Textbox(submit_btn=True, stop_btn=False), None, at.text, **quick
        )

    end(at.text.stop, actions.stop, [turns])
    end(at.chat.clear, actions.clear, [])
    end(at.new.click, actions.clear, [])


def _index(event: Any) -> int:
    return int(event.index[0] if isinstance(event.index, (list, tuple)) else event.index)


def _status(available: Availability) -> str:
    """The line under the head: empty while all is well."""
    if not available.problem:
        return ""
    return f'<p role="status">{html.escape(available.problem)} This page asks again every few seconds.</p>'
