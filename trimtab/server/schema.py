"""What may be asked for, each field with its bounds. Nothing is converted, and nothing unknown is passed over."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

LONGEST = 1 << 20  # tokens, whatever the model's context is
PROMPTS = 64  # in one request

Name = Annotated[str, Field(max_length=256)]
Id = Annotated[int, Field(ge=0, lt=1 << 31)]
Ids = Annotated[list[Id], Field(min_length=1, max_length=LONGEST)]
Text = Annotated[str, Field(max_length=2_000_000)]
Several = Field(min_length=1, max_length=PROMPTS)
Stop = Annotated[str, StringConstraints(min_length=1, max_length=64)]
AdapterName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Asked(BaseModel):
    """A body; fields that other servers know are taken at the values that change nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, said: Any) -> Any:
        if not isinstance(said, dict):
            return said
        return {name: value for name, value in said.items() if value not in cls.neutral.get(name, ())}


class StreamOptions(Asked):
    """Of a stream."""

    neutral: ClassVar = {"include_obfuscation": (None, False)}
    include_usage: bool = False


class Generation(Asked):
    """What completions and chats have in common."""

    neutral: ClassVar = {
        **dict.fromkeys(("frequency_penalty", "presence_penalty"), (None, 0)),
        **dict.fromkeys(("logit_bias", "metadata"), (None, {})),
        **{"service_tier": (None, "auto", "default"), "store": (None, False)},
    }
    model: Name | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = 1
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=LONGEST)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: Name | None = None
    ignore_eos: bool = False

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def usage_in_stream(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class Completion(Generation):
    """`POST /v1/completions`."""

    neutral: ClassVar = Generation.neutral | {"best_of": (None, 1), "suffix": (None, "")}
    prompt: Text | Annotated[list[Text], Several] | Ids | Annotated[list[Ids], Several]
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else list(self.prompt)  # type: ignore[list-item]


class Part(Asked):
    """A piece of a message: text is all that there is."""

    type: Literal["text"]
    text: Text


class Message(Asked):
    """One turn of a chat."""

    neutral: ClassVar = {"tool_calls": (None, []), "refusal": (None,), "audio": (None,)}
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=256)]
    name: Name | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates expect it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text} | ({"name": self.name} if self.name else {})


Messages = Annotated[list[Message], Field(min_length=1, max_length=1024)]


class Chat(Generation):
    """`POST /v1/chat/completions`."""

    neutral: ClassVar = Generation.neutral | {
        **{"tools": (None, []), "functions": (None, []), "tool_choice": (None, "none", "auto")},
        **{"response_format": (None, {"type": "text"}), "parallel_tool_calls": (None, True, False)},
    }
    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=LONGEST)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class Tokenize(Asked):
    """`POST /tokenize`: a prompt, or the messages of a chat."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = False


class Detokenize(Asked):
    """`POST /detokenize`."""

    model: Name | None = None
    tokens: Annotated[list[Id], Field(max_length=LONGEST)]


class LoadAdapter(Asked):
    """`POST /v1/load_lora_adapter`: `lora_name` is an entry of the folder of adapters, and `lora_path` the same."""

    lora_name: AdapterName
    lora_path: AdapterName | None = None


class UnloadAdapter(Asked):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: AdapterName


class Fault(BaseModel):
    """An error, as OpenAI's clients read it."""

    class Body(BaseModel):
        message: str
        type: str
        param: str | None
        code: str | None

    error: Body
