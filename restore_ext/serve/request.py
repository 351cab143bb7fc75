"""The body of /v1/chat/completions: what is taken, and what is refused rather than passed over."""

from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

# Options of OpenAI that this server does not have, and the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("auto",),
    "top_logprobs": (0,),
}
SLIP = 0.75  # difflib's ratio to one of our keys, from which on another is a slip of it
# What says who asks: of no consequence here.
IGNORED = ("user", "safety_identifier", "prompt_cache_key")


class ImageURL(BaseModel):
    model_config = ConfigDict(extra="forbid")

    url: str
    detail: Literal["auto", "low", "high"] = "auto"  # the budget is what counts here


class ImagePart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["image_url"]
    image_url: ImageURL


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


def _as_parts(content: Any) -> Any:
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Part = Annotated[ImagePart | TextPart, Field(discriminator="type")]


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[Part], BeforeValidator(_as_parts)] = []
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @field_validator("role")
    @classmethod
    def _as_templates_have_it(cls, role: str) -> str:
        return "system" if role == "developer" else role

    @model_validator(mode="after")
    def _only_users_show_pictures(self) -> "Message":
        if self.role != "user" and any(part.type == "image_url" for part in self.content):
            raise ValueError(f"images must be in messages of the user, got one of {self.role}")
        return self


class Override(BaseModel):
    """What `metadata` changes of the server's reduction, for one request. OpenAI's client sends
    strings. Its other keys are the client's own, but for what can only be a slip of one of ours."""

    method: str | None = None
    keep: int | None = Field(default=None, ge=1)
    restore: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_slips(cls, metadata: Any) -> Any:
        if not isinstance(metadata, dict):
            return metadata
        ours = list(cls.model_fields)
        for key, value in metadata.items():
            said = str(key).lower()
            alike = said.startswith("restore") or get_close_matches(said, ours, 1, SLIP)
            if alike and key not in ours:
                raise ValueError(
                    f"{key} must be left out, it is too much like this server's {', '.join(ours)}, "
                    f"got {value!r}"
                )
        return metadata


class StreamOptions(BaseModel):
    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[Message] = Field(min_length=1)
    metadata: Override = Override()
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=[], max_length=4)
    tools: list[dict[str, Any]] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_would_be_passed_over(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, neutral in NEUTRAL.items():
            if body.get(name) is not None and body[name] not in neutral:
                values = " or ".join(repr(value) for value in neutral)
                raise ValueError(f"{name} must be {values} on this server, got {body[name]!r}")
        # null stands for the default, as with OpenAI.
        known = {n: v for n, v in body.items() if n not in NEUTRAL and v is not None}
        return {name: value for name, value in known.items() if name not in IGNORED}

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @property
    def images(self) -> list[str]:
        """The URLs of all pictures, in order."""
        parts = [part for message in self.messages for part in message.content]
        return [part.image_url.url for part in parts if isinstance(part, ImagePart)]


def keys_at(place: tuple[int | str, ...]) -> list[str]:
    """The keys that the object at this place of the body may have."""
    if not place:
        return [*ChatRequest.model_fields, *NEUTRAL, *IGNORED]
    if place[-1] == "text":
        return [*TextPart.model_fields]
    part = ImageURL if place[-2:] == ("image_url", "image_url") else ImagePart
    return [*part.model_fields]
