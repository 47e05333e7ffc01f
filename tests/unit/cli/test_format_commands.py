from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from chaccu.cli.formats import app
from chaccu.conversation import list_formats
from chaccu.errors import UsageError
from chaccu.testing.tiny import build_tokenizer

ASKED = json.dumps({"system": "S", "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]})
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def run(*arguments: str, stdin: str = "") -> str:
    result = CliRunner().invoke(app, arguments, input=stdin, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def add_template(folder: Path) -> None:
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": TEMPLATE}))


def test_list_prints_one_name_a_line() -> None:
    assert run("list").splitlines() == list_formats()


def test_render_prints_the_text_and_nothing_else() -> None:
    assert run("render", "llama-2", stdin=ASKED) == "[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] A </s><s>"
    assert run("render", "llama-2", "--pending", stdin=ASKED) == "[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST]"


def test_render_with_the_tokenizer_s_own_template(tmp_path: Path) -> None:
    build_tokenizer(tmp_path)
    add_template(tmp_path)
    own = json.loads(run("render", "tokenizer", "--tokenizer", str(tmp_path), stdin=ASKED))
    assert own == json.loads(run("render", "chatml", "--tokenizer", str(tmp_path), stdin=ASKED))
    assert sum(own["mask"]) > 1


def test_show_tells_what_a_format_is_and_tries_it_with_a_tokenizer(tmp_path: Path) -> None:
    shown = run("show", "qwen2.5")
    assert "stops at: '<|im_end|>', '<|endoftext|>'" in shown
    assert "<|im_start|>assistant\n»ANSWER<|im_end|>«\n" in shown
    build_tokenizer(tmp_path)
    add_template(tmp_path)
    assert run("show", "tokenizer", "--tokenizer", str(tmp_path)).endswith(
        "keeps token identity and its loss mask with this tokenizer\n"
    )


def test_the_tokenizer_s_own_template_needs_a_tokenizer() -> None:
    with pytest.raises(UsageError, match="no model folder is given"):
        CliRunner().invoke(app, ["render", "tokenizer"], input=ASKED, catch_exceptions=False)
