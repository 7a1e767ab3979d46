"""Exported models behind the interfaces that programs talk to: pipelines, `transformers serve` and `chat`."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx2
import openai
import pytest
import torch
from transformers import AutoTokenizer, pipeline

from .exports import export_tiny, load

MESSAGES = [{"role": "user", "content": "the and of a to in was"}]
OTHERS = [
    {"role": "user", "content": "of"},
    {"role": "assistant", "content": "the"},
    {"role": "user", "content": "was"},
]
NEW = 12
# A machine that never had the package.
TRANSFORMERS = "import sys; sys.modules['linearize'] = None\nfrom transformers.cli.transformers import main\nmain()\n"


def answer(directory: Path, messages: list[dict]) -> str:
    """What `generate` says, greedily."""
    model, tokenizer = load(directory), AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def command(*arguments) -> dict:
    # huggingface_hub asks loopback for nothing either while it is offline.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "0"}
    return {"args": [sys.executable, "-c", TRANSFORMERS, *map(str, arguments)], "env": environment, "text": True}


@dataclass
class Server:
    url: str
    log: Path
    process: subprocess.Popen

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """Starts `transformers serve` on loopback and waits until it answers."""
    servers = []

    def start(*arguments) -> Server:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = tmp_path_factory.mktemp("serve") / "log"
        options = ("--host", "127.0.0.1", "--port", port, "--device", "cpu", "--trust-remote-code")
        with log.open("w") as file:
            started = command("serve", *arguments, *options)
            process = subprocess.Popen(**started, stdout=file, stderr=subprocess.STDOUT)
        server = Server(f"http://127.0.0.1:{port}", log, process)
        servers.append(server)
        while True:
            assert process.poll() is None, log.read_text()
            try:
                httpx2.get(f"{server.url}/health").raise_for_status()
                return server
            except httpx2.HTTPError:
                time.sleep(0.1)

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def server(serve) -> Server:
    return serve()


def ask(server: Server, model: Path, messages: list[dict], **options):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    # Greedily; transformers takes at least 1024 tokens if the request does not say.
    return client.chat.completions.create(
        model=str(model), messages=messages, temperature=0, max_tokens=NEW, **options
    )


def test_served_answers_are_those_of_generate(server, exported):
    for messages in (MESSAGES, OTHERS):
        found = ask(server, exported, messages)
        assert found.choices[0].message.content == answer(exported, messages) != ""
    streamed = list(ask(server, exported, MESSAGES, stream=True))
    assert len(streamed) > NEW // 2
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
    assert text == answer(exported, MESSAGES)


def test_one_server_answers_for_two_models(server, exported, tiny_model, tmp_path):
    other = export_tiny(tiny_model, tmp_path / "other", seed=5)
    for _ in range(2):
        answers = [ask(server, model, MESSAGES).choices[0].message.content for model in (exported, other)]
        assert answers == [answer(exported, MESSAGES), answer(other, MESSAGES)]
        assert answers[0] != answers[1]


def test_continuous_batching_is_refused_and_the_log_says_why(serve, exported):
    server = serve(exported, "--continuous-batching")
    with pytest.raises(openai.InternalServerError):
        ask(server, exported, MESSAGES)
    server.stop()
    assert "continuous batching needs: use `generate`, which takes batches, or `transformers serve`" in (
        server.log.read_text()
    )


def test_chat(server, exported):
    flags = (f"max_new_tokens={NEW}", "do_sample=False")
    # Whether to go on is asked where an answer has as many tokens as it may.
    typed = f"{MESSAGES[0]['content']}\nn\n!exit\n"
    said = subprocess.run(**command("chat", exported, server.url, *flags), input=typed, capture_output=True)
    assert said.returncode == 0, said.stderr
    assert answer(exported, MESSAGES) in said.stdout


def test_pipeline(exported):
    """Alone and in a batch, whose rows are padded to the left."""
    talk = pipeline("text-generation", model=str(exported), trust_remote_code=True)
    expected = [answer(exported, messages) for messages in (MESSAGES, OTHERS)]
    for batch_size in (1, 2):
        out = talk([MESSAGES, OTHERS], max_new_tokens=NEW, do_sample=False, batch_size=batch_size)
        assert [found[0]["generated_text"][-1]["content"] for found in out] == expected
    torch.manual_seed(0)
    drawn = talk(MESSAGES, max_new_tokens=NEW, do_sample=True, num_return_sequences=3)
    assert len({found["generated_text"][-1]["content"] for found in drawn}) > 1
