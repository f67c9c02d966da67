"""lm-eval's `local-completions` against a server: the scores that it reads are the engine's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from server_running import running

from trimtab.models.pocket import POCKET
from trimtab.server.text import Vocabulary

pytestmark = pytest.mark.filterwarnings("ignore")


def test_scores_and_texts_are_read_as_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    why = "lm-eval brings half a gigabyte and is not installed here: pip install 'lm-eval[api]'"
    instance = pytest.importorskip("lm_eval.api.instance", reason=why).Instance
    client = pytest.importorskip("lm_eval.models.openai_completions", reason=why).LocalCompletionsAPI
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    vocabulary = Vocabulary(POCKET["pocket"])
    context, rest = "def add(a, b):", "\n    return a + b"

    def asked(kind: str, arguments: Any) -> Any:
        return instance(request_type=kind, doc={}, arguments=arguments, idx=0)

    with running(tmp_path, key="k") as server:
        address = f"http://127.0.0.1:{server.port}/v1/completions"
        model = client(
            base_url=address,
            model="pocket",
            tokenizer_backend="huggingface",
            tokenizer=str(POCKET["pocket"]),
            max_length=512,
        )
        (score,) = model.loglikelihood([asked("loglikelihood", (context, rest))], disable_tqdm=True)
        tokens = vocabulary.encode(context + rest, special=False)[len(vocabulary.encode(context, special=False)) :]
        assert score[0] == pytest.approx(sum(-0.1 * (1 + token % 7) for token in tokens)) and score[1]
        options = {"until": ["b):"], "max_gen_toks": 40}
        (text,) = model.generate_until([asked("generate_until", (context, options))], disable_tqdm=True)
        assert text.endswith("def add(a, ")
