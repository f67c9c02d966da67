"""`trimtab serve` as its clients see it: real processes, and an engine that says the prompt again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_engine import BUSY, CONTEXT, EOS, REFUSE
from server_running import Running, adapter_folder, model_folder, running, until

from trimtab.models.pocket import POCKET
from trimtab.server.text import Vocabulary

openai = pytest.importorskip("openai")
VOCABULARY = Vocabulary(POCKET["pocket"])
TEXT = "def add(a, b):\n    return 'ö' + “日本” 🙂"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    model = model_folder(folder / "model")
    adapters = adapter_folder(folder / "adapters")
    with running(folder / "run", "--folder", str(model), "--adapters", str(adapters)) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_what_openai_s_client_asks_is_answered(client: Any) -> None:
    tokens = VOCABULARY.encode(TEXT, special=False)
    done = client.completions.create(model="pocket", prompt=TEXT, max_tokens=len(tokens), temperature=0)
    assert done.choices[0].text == TEXT and done.choices[0].finish_reason == "length"
    assert done.usage.prompt_tokens == len(tokens) + 1 and done.usage.completion_tokens == len(tokens)
    assert done.object == "text_completion" and done.model == "pocket" and done.id.startswith("cmpl-")
    several = client.completions.create(model="pocket", prompt=["a b", "c d"], max_tokens=2, n=2)
    assert [(choice.index, choice.text) for choice in several.choices] == [
        (0, "a b"),
        (1, "a b"),
        (2, "c d"),
        (3, "c d"),
    ]
    ids = client.completions.create(model="pocket", prompt=[[5, 6], [7]], max_tokens=1)
    assert [choice.text for choice in ids.choices] == [VOCABULARY.text([5]), VOCABULARY.text([7])]


def test_streams_of_openai_s_client_are_whole(client: Any) -> None:
    tokens = VOCABULARY.encode(TEXT, special=False)
    options = {"model": "pocket", "prompt": TEXT, "max_tokens": len(tokens), "stream": True, "n": 2}
    texts, reasons, usage = ["", ""], [None, None], None
    for chunk in client.completions.create(**options, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            assert "\ufffd" not in choice.text
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        usage = chunk.usage or usage
    assert texts == [TEXT, TEXT] and reasons == ["length", "length"]
    assert usage is not None and usage.completion_tokens == 2 * len(tokens)


def test_a_chat_is_its_template_s_prompt(client: Any, server: Running) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": [{"type": "text", "text": "Hi ö"}]}]
    rendered = "<system>S\n<user>Hi ö\n<assistant>"
    tokens = VOCABULARY.encode("<|bos|>" + rendered, special=False)
    done = client.chat.completions.create(model="pocket", messages=messages, max_completion_tokens=len(tokens) - 1)
    assert done.choices[0].message.content == rendered and done.choices[0].message.role == "assistant"
    assert done.usage.prompt_tokens == len(tokens)
    chunks = list(
        client.chat.completions.create(
            model="pocket", messages=messages, max_tokens=len(tokens) - 1, stream=True, logprobs=True, top_logprobs=2
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "length"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == rendered
    entries = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert bytes(b for entry in entries for b in entry.bytes).decode() == rendered
    assert all(len(entry.top_logprobs) == 2 and entry.top_logprobs[0].logprob == entry.logprob for entry in entries)
    shown = server.ask("/tokenize", {"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": False})
    assert server.ask("/detokenize", {"tokens": shown[1]["tokens"]})[1] == {"prompt": "<|bos|><user>x\n"}
    with pytest.raises(openai.BadRequestError, match="no developers"):
        client.chat.completions.create(model="pocket", messages=[{"role": "developer", "content": "x"}])


def test_errors_come_as_openai_s_client_knows_them(client: Any, server: Running) -> None:
    ask = client.completions.create
    with pytest.raises(openai.NotFoundError) as missing:
        ask(model="gpt-9", prompt="a")
    assert missing.value.code == "model_not_found" and "gpt-9" in missing.value.message
    with pytest.raises(openai.RateLimitError) as full:
        ask(model="pocket", prompt="a", seed=REFUSE)
    assert full.value.response.headers["retry-after"] == "3" and "too many wait" in full.value.message
    with pytest.raises(openai.InternalServerError, match="no memory") as busy:
        ask(model="pocket", prompt="a", seed=BUSY, stream=True)
    assert busy.value.status_code == 503
    with pytest.raises(openai.BadRequestError, match="frequency_penalty"):
        ask(model="pocket", prompt="a", frequency_penalty=0.5)
    with pytest.raises(openai.BadRequestError, match="16,384"):
        ask(model="pocket", prompt="a", max_tokens=CONTEXT)
    neutral = {"frequency_penalty": 0, "best_of": 1, "logit_bias": {}, "suffix": None}
    assert ask(model="pocket", prompt="ab", max_tokens=1, extra_body=neutral).choices[0].text == "ab"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, None),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [4096]}, "4096"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": "a", "n": 9}, "n:"),
        ({"prompt": "a", "n": True}, "n:"),
        ({"prompt": "a", "temperature": 2.1}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 10**30}, "max_tokens"),
        ({"prompt": "a", "stop": ["a"] * 5}, "stop"),
        ({"prompt": "a", "stop": "a" * 65}, "stop"),
        ({"prompt": "a", "stop": ""}, "stop"),
        ({"prompt": "a", "stream": "yes"}, "stream"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "\ud800": 2}, "unicode"),
        ({"prompt": "\ud800"}, "prompt"),
        ([], "JSON object"),
        (b"{", "no JSON"),
        (b"\xff\xfe{", "pars"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature"),
        (b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", "pars"),
        (b"[" * 100_000, "pars"),
        (b'{"prompt": "' + b"\xc3" + b'"}', "pars"),
    ],
)
def test_what_is_not_understood_is_named(server: Running, body: Any, said: str | None) -> None:
    status, answer, _ = server.ask("/v1/completions", body)
    if said is None:  # a tokenizer that puts a token around a text gives even an empty one some
        assert status == 200
        return
    assert status == 400 and set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error" and said in answer["error"]["message"]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "x",
        [{"role": "tool", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}]}],
        [{"role": "user", "content": "x", "tool_calls": [1]}],
    ],
)
def test_messages_are_text(server: Running, messages: Any) -> None:
    status, answer, _ = server.ask("/v1/chat/completions", {"messages": messages})
    assert status == 400 and answer["error"]["param"] == "messages"


def test_a_stop_string_is_never_shown_and_ends_the_work(server: Running) -> None:
    before = len(server.orders("cancel"))
    chunks = server.events(
        "/v1/completions", prompt="one two three four", max_tokens=4000, stop=["ee fo", "zz"], logprobs=1
    )
    assert chunks[-1] == "[DONE]"
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1])
    assert text == "one two thr" and chunks[-2]["choices"][0]["finish_reason"] == "stop"
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks[:-1]]
    assert "".join(name for one in told for name in one["tokens"]).startswith("one two")
    assert all(offset < len(text) for one in told for offset in one["text_offset"])
    until(lambda: len(server.orders("cancel")) == before + 1)


def test_a_text_ends_where_the_model_ends_it(server: Running) -> None:
    for chosen, written in (({}, 4), ({"ignore_eos": True}, 8)):
        answer = server.ask(
            "/v1/completions", {"prompt": "a b c d", "max_tokens": 8, "seed": EOS, "logprobs": 0, **chosen}
        )[1]
        choice = answer["choices"][0]
        assert choice["finish_reason"] == ("length" if chosen else "stop")
        assert answer["usage"]["completion_tokens"] == written
        assert ("<|eos|>" in choice["logprobs"]["tokens"]) == bool(chosen) and "<|eos|>" not in choice["text"]


def test_echo_and_log_probabilities_as_lm_eval_reads_them(server: Running) -> None:
    tokens = VOCABULARY.encode(TEXT, special=False)
    body = {
        "prompt": [tokens, tokens[:3]],
        "max_tokens": 1,
        "logprobs": 1,
        "echo": True,
        "temperature": 0,
        "seed": 1234,
    }
    first, second = server.ask("/v1/completions", body)[1]["choices"]
    told = first["logprobs"]
    assert first["text"].startswith(TEXT) and len(second["logprobs"]["tokens"]) == 4
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    assert told["token_logprobs"][1:-1] == [pytest.approx(-0.1 * (1 + token % 7)) for token in tokens[1:]]
    assert all(
        max(top.values()) == one for top, one in zip(told["top_logprobs"][1:], told["token_logprobs"][1:], strict=True)
    )
    for name, offset in zip(told["tokens"], told["text_offset"], strict=True):
        assert name.startswith("bytes:") or first["text"][offset:].startswith(name)
    nothing_new = server.ask("/v1/completions", {"prompt": "a b", "max_tokens": 0, "echo": True, "logprobs": 2})[1]
    assert nothing_new["choices"][0]["text"] == "a b" and nothing_new["usage"]["completion_tokens"] == 0
    assert nothing_new["choices"][0]["logprobs"]["tokens"][0] == "<|bos|>"
    plain = server.ask("/v1/completions", {"prompt": "a b", "max_tokens": 1, "echo": True})[1]["choices"][0]
    assert plain["text"] == "a ba" and plain["logprobs"] is None
    streamed = server.events("/v1/completions", **body | {"prompt": tokens})
    parts = [chunk["choices"][0] for chunk in streamed[:-1]]
    assert "".join(part["text"] for part in parts) == first["text"]
    for field in ("tokens", "token_logprobs", "text_offset"):
        assert [one for part in parts for one in part["logprobs"][field]] == told[field]


def test_choices_of_one_seed_differ_and_are_said_again(server: Running) -> None:
    server.ask("/v1/completions", {"prompt": "a", "max_tokens": 1, "n": 3, "seed": -1})
    seeds = [order["seed"] for order in server.orders("submit")[-3:]]
    assert seeds == [(1 << 63) - 1, 0, 1]


def test_adapters_are_models(server: Running) -> None:
    rows = server.ask("/v1/models")[1]["data"]
    assert [(row["id"], row["parent"], row["root"]) for row in rows] == [
        *[("pocket", None, "pocket"), ("one", "pocket", "one"), ("two", "pocket", "two")]
    ]
    assert server.ask("/v1/completions", {"model": "two", "prompt": "a", "max_tokens": 1})[1]["model"] == "two"
    assert [order["adapter"] for order in server.orders("submit")][-1] == "two"
    assert server.ask("/tokenize", {"model": "three", "prompt": "a"})[0] == 404


def test_tokens_and_back_in_vllm_s_shapes(server: Running) -> None:
    said = server.ask("/tokenize", {"model": "pocket", "prompt": TEXT, "return_token_strs": True})[1]
    assert said["count"] == len(said["tokens"]) == len(said["token_strs"]) and said["max_model_len"] == CONTEXT
    assert server.ask("/detokenize", {"model": "pocket", "tokens": said["tokens"]})[1]["prompt"] == "<|bos|>" + TEXT
    assert server.ask("/tokenize", {"prompt": "a", "add_special_tokens": False})[1]["count"] == 1
    assert server.ask("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "b"}]})[0] == 400
    assert server.ask("/detokenize", {"tokens": [4096]})[0] == 400


def test_of_a_text_that_cannot_fit_only_the_beginning_is_read(server: Running) -> None:
    text = "".join(f"x{place} " for place in range(250_000))
    for path, body in (("/v1/completions", {"prompt": text}), ("/tokenize", {"prompt": text})):
        status, answer, _ = server.ask(path, body)
        assert status == 400 and "shorten it" in answer["error"]["message"]
    assert server.ask("/tokenize", {"prompt": text[:200_000], "add_special_tokens": False})[1]["count"] > CONTEXT
    status, answer, _ = server.ask("/v1/completions", {"prompt": text[:60_000], "max_tokens": 1})
    assert status == 400 and "16,384" in answer["error"]["message"]


def test_metrics_count_what_was_done(server: Running) -> None:
    before = {name: server.metric(f"vllm:{name}") for name in ("prompt_tokens_total", "generation_tokens_total")}
    counted = 'vllm:request_success_total{model_name="pocket",engine="0",finished_reason="length"}'
    ended, took = server.metric(counted), server.metric("vllm:e2e_request_latency_seconds_count")
    server.ask("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 9, "n": 2})
    assert server.metric("vllm:prompt_tokens_total") == before["prompt_tokens_total"] + 3
    assert server.metric("vllm:generation_tokens_total") == before["generation_tokens_total"] + 18
    assert server.metric(counted) == ended + 2 and server.metric("vllm:e2e_request_latency_seconds_count") == took + 2
    assert server.metric("vllm:kv_cache_usage_perc") == 0.25 and server.metric("vllm:num_requests_waiting") == 2
    text = server.ask("/metrics")[1]
    for line in text.splitlines():
        assert line.startswith("# ") or float(line.rpartition(" ")[2]) >= 0
    buckets = [line for line in text.splitlines() if line.startswith("vllm:time_to_first_token_seconds_bucket")]
    counts = [int(line.rpartition(" ")[2]) for line in buckets]
    assert counts == sorted(counts) and counts[-1] == server.metric("vllm:time_to_first_token_seconds_count")


def test_other_names_methods_and_sizes_are_refused(server: Running) -> None:
    assert server.ask("/v1/nothing")[0] == 404 and server.ask("/v1/completions")[0] == 405
    status, answer, _ = server.ask("/v1/completions", b" " * 2_000_001)
    assert status == 413 and "2,000,000" in answer["error"]["message"]
    assert server.ask("/health", headers={"X-Long": "a" * 20_000})[0] == 431
    assert server.ask("/v1/models", headers={"Host": "evil.example"})[0] == 403
    for name in ("localhost:1", "127.0.0.1", "[::1]:80"):
        assert server.ask("/v1/models", headers={"Host": name})[0] == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded"):  # what a page elsewhere may send unasked
        assert server.ask("/v1/completions", {"prompt": "a"}, headers={"Content-Type": kind})[0] == 400
    assert server.ask("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "one"})[0] == 404


def test_keys_are_asked_for_everywhere_but_at_health(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "adapters")
    (folder / "file").write_text("no adapter")
    with running(tmp_path / "run", key="s3cret", admin_key="b0ss", adapters=str(folder)) as server:
        assert "s3cret" not in " ".join(
            part for what in ("server.front", "engine") for part in server.child(what).cmdline()
        )
        server.key = None
        assert server.ask("/health")[0] == 200
        routes = ("/", "/metrics", "/v1/models", "/openapi.json", "/v1/nothing", "/health/", "//health", "/tokenize")
        for path in routes:
            for key in (None, "wrong", "s3cre", "s3crets"):
                status, answer, _ = server.ask(path, key=key)
                assert status == 401 and answer["error"]["code"] == "invalid_api_key"
        assert server.ask("/", headers={"Authorization": "Basic OnMzY3JldA=="})[0] == 200
        assert server.ask("/")[2]["www-authenticate"].startswith("Basic")
        assert server.ask("/v1/models", key="s3cret")[0] == 200
        load = {"lora_name": "one", "lora_path": "one"}
        assert server.ask("/v1/load_lora_adapter", load)[0] == 401
        assert server.ask("/v1/load_lora_adapter", load, key="s3cret")[0] == 403
        assert server.ask("/v1/load_lora_adapter", load, key="b0ss")[:2] == (
            200,
            "Success: LoRA adapter 'one' added successfully.",
        )
        assert server.orders("load")[0]["path"] == str(folder / "one")
        assert server.ask("/v1/load_lora_adapter", load, key="b0ss")[0] == 400
        for name in ("..", "../one", "/etc", "three", "one/", "", "a" * 65, "two/../one", "file"):
            for body in ({"lora_name": name}, {"lora_name": "two", "lora_path": name}):
                status, answer, _ = server.ask("/v1/load_lora_adapter", body, key="b0ss")
                assert status in (400, 404), answer
        assert len(server.orders("load")) == 1
        names = [row["id"] for row in server.ask("/v1/models", key="s3cret")[1]["data"]]
        assert names == ["pocket", "one"]
        server.child("engine").kill()  # an engine that comes back is told of it again
        until(lambda: len(server.orders("load")) == 2)
        until(server.healthy)
        assert server.ask("/v1/unload_lora_adapter", {"lora_name": "one"}, key="b0ss")[0] == 200
        assert server.ask("/v1/unload_lora_adapter", {"lora_name": "one"}, key="b0ss")[0] == 404
        assert json.loads(server.out.read_text())["adapters"] == []
