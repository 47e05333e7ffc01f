"""A real gateway keeps what its OpenAPI description says: thousands of requests made from it, right and wrong ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from chaccu.serve.gateway.access.keys import KeyFile
from chaccu.testing.processes import start_gateway, start_worker

# A context that holds any number of tokens that may be asked for, and nothing that it cannot.
MODEL = "scripted:fixed?tokens=3&context_tokens=4294967296&can=penalties,logit_bias,json_schema,json_resumed,tools"


def test_requests_made_from_the_description_are_answered_as_it_says(tmp_path: Path) -> None:
    schemathesis = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    if schemathesis is None:
        pytest.skip("schemathesis is not installed")
    keys = KeyFile(tmp_path / "keys.json")
    shown, _ = keys.create("alice")
    worker, _ = keys.create("gpu", scopes=["worker"])
    with (
        start_gateway(tmp_path, "--keys", str(keys.path)) as gateway,
        start_worker(tmp_path, gateway, MODEL, "--join-token", worker),
    ):
        with urllib.request.urlopen(f"{gateway.url}/openapi.json") as response:
            description = json.load(response)
        # A model is any name to the description; only one is served here.
        for schema in description["components"]["schemas"].values():
            if "model" in schema["properties"] and schema["title"].endswith("Body"):
                schema["properties"]["model"] = {"enum": ["fixed"]}
            # What these may be depends on the last message, which no schema can tell of: words do.
            if schema["title"] == "ChatBody":
                assert "last message is the assistant's" in str(schema["properties"]["continue_final_message"])
                del schema["properties"]["add_generation_prompt"], schema["properties"]["continue_final_message"]
            # What tools are for depends on the messages, and a choice on the tools.
            for name in ("tools", "tool_choice") if schema["title"] in ("ChatBody", "MessagesBody", "ResponsesBody") else ():
                del schema["properties"][name]
            # How many choices there may be to a prompt depends on how many prompts there are; and ids on the vocabulary.
            if schema["title"] == "CompletionBody":
                schema["properties"]["n"] = {"enum": [1, None]}
            # So do blocks of tools.
            if schema["title"] == "Turn":
                schema["properties"]["content"] = {"type": "string"}
            # Its vocabulary is one of bytes.
            for name in {"tokens", "input", "prompt"} & set(schema["properties"]):
                schema["properties"][name] = json.loads(json.dumps(schema["properties"][name]).replace(str(2**31 - 1), "257"))
            for form in schema["properties"].get("logit_bias", {}).get("anyOf", []):
                if form["type"] == "object":
                    form["propertyNames"]["pattern"] = "^[0-9]{1,2}$"
        # To make arrays beyond the longest takes minutes; another test sends them.
        text = json.dumps(description).replace('"maxItems": 10000', '"maxItems": 1000000')
        (tmp_path / "openapi.json").write_text(text)
        command = [schemathesis, "run", "openapi.json", "--url", gateway.url, "--header", f"Authorization: Bearer {shown}"]
        # Any 5xx is a failure to it, and /ready answers 503 by design.
        command += ["--exclude-path", "/ready", "--phases", "coverage,fuzzing", "--max-examples", "15"]
        command += ["--generation-deterministic", "--continue-on-failure", "--no-color"]
        checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout
        assert "10 passed" in checked.stdout
        assert gateway.exit_code is None
        assert "Traceback" not in gateway.log
