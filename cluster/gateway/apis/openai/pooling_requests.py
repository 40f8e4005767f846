"""Parsing of the bodies of /v1/embeddings, /rerank and /score into pooling requests.

/v1/embeddings has the fields of OpenAI's API. /rerank and /score have the fields of vLLM 0.32 (`entrypoints/pooling`);
Jina's and Cohere's rerankers have the same fields. A field is refused if it would change the answer and is not
supported; the error names the field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from cluster.api.outcomes import invalid, quoted
from cluster.gateway.apis.json_values import kind
from cluster.gateway.apis.openai.fields import Fields, whole_numbers
from cluster.gateway.apis.openai.requests import metadata_of, priority_of, refuse_unserved, salt_of
from cluster.gateway.calls.pooling.pooling_request import (
    WHOLE_CONTEXT,
    IdsInputs,
    InputField,
    PairInputs,
    ParsedPooling,
    PoolingInputs,
    PoolingRequest,
    TextInputs,
    check_count,
    check_pairs,
)

_UNSERVED: Final[dict[str, tuple[Any, ...]]] = {
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "padding": ("do_not_pad",),
    "truncation_side": (),
    "use_activation": (True,),
}
_UNSERVED_EMBEDDINGS: Final = _UNSERVED | {
    "add_generation_prompt": (False,),
    "add_special_tokens": (True,),
    "chat_template": (),
    "continue_final_message": (False,),
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
    "media_io_kwargs": ({},),
    "messages": (),
}
_UNSERVED_PAIRS: Final = _UNSERVED | {
    "instruction": (),
    "max_chunks_per_doc": (),
    "max_tokens_per_doc": (0,),
    "max_tokens_per_query": (0,),
    "rank_fields": (),
}
_COMMON: Final = frozenset({"cache_salt", "metadata", "model", "priority", "truncate_prompt_tokens"})
EMBEDDINGS_FIELDS: Final = _COMMON | _UNSERVED_EMBEDDINGS.keys() | {"dimensions", "encoding_format", "input"}
"""The fields that are read from a body of /v1/embeddings; all other fields are ignored."""
RERANK_FIELDS: Final = _COMMON | _UNSERVED_PAIRS.keys() | {"documents", "query", "return_documents", "top_n"}
_PAIRS: Final = (("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents"), ("queries", "items"))
"""Pairs of fields in which /score accepts the texts, as in vLLM. The first pair with both fields present is used."""
SCORE_FIELDS: Final = _COMMON | _UNSERVED_PAIRS.keys() | {name for names in _PAIRS for name in names}
INPUT_FIELDS: Final = frozenset({"input", "query", *(name for names in _PAIRS for name in names)})
"""Fields that hold the inputs of a request. Only these fields may be large."""


def parse_embeddings(body: Fields) -> ParsedPooling:
    """Parse a body of /v1/embeddings. Raises CallError."""
    refuse_unserved(body, _UNSERVED_EMBEDDINGS)
    form = body.text("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise invalid("encoding_format", f"must be float or base64, got {quoted(form)}")
    request = _request(body, _inputs(body), dimensions=body.integer("dimensions"))
    return ParsedPooling(request, is_base64=form == "base64")


def parse_rerank(body: Fields) -> ParsedPooling:
    """Parse a body of /rerank. Raises CallError."""
    refuse_unserved(body, _UNSERVED_PAIRS)
    query = body.values.get("query")
    if not isinstance(query, str):
        raise body.wrong("query", "a string")
    documents, is_list = _texts(body, "documents")
    pairs = PairInputs([query], documents, InputField("query", False), InputField("documents", is_list))
    check_pairs(pairs)
    top_n = body.integer("top_n")
    if top_n is not None and top_n < 0:
        raise invalid("top_n", f"must be at least 0 (0: all documents), got {top_n}")
    return ParsedPooling(_request(body, pairs), top_n=top_n or 0, returns_documents=body.flag("return_documents", True))


def parse_score(body: Fields) -> ParsedPooling:
    """Parse a body of /score. Raises CallError."""
    refuse_unserved(body, _UNSERVED_PAIRS)
    given = [names for names in _PAIRS if all(body.values.get(name) is not None for name in names)]
    if not given:
        raise invalid("text_1", "is missing: give text_1 and text_2, each a string or an array of strings")
    first, second = given[0]
    (queries, first_is_list), (documents, second_is_list) = _texts(body, first), _texts(body, second)
    pairs = PairInputs(queries, documents, InputField(first, first_is_list), InputField(second, second_is_list))
    check_pairs(pairs)
    return ParsedPooling(_request(body, pairs))


PARSERS: Final[Mapping[str, Callable[[Fields], ParsedPooling]]] = {
    "embeddings": parse_embeddings,
    "rerank": parse_rerank,
    "score": parse_score,
}


def _request(body: Fields, inputs: PoolingInputs, dimensions: int | None = None) -> PoolingRequest:
    keep = body.integer("truncate_prompt_tokens")
    if keep is not None and keep != WHOLE_CONTEXT and keep < 1:
        raise invalid("truncate_prompt_tokens", f"must be at least 1, or -1 for the model's context; got {keep}")
    return PoolingRequest(
        body.text("model") or "",
        inputs,
        dimensions,
        truncate_tokens=keep,
        cache_salt=salt_of(body),
        metadata=metadata_of(body),
        priority_class=priority_of(body),
    )


def _inputs(body: Fields) -> PoolingInputs:
    """Return the inputs in the field `input`: a string, an array of strings, an array of token ids, or an array of
    arrays of token ids."""
    value, name = body.values.get("input"), "input"
    if isinstance(value, str):
        return TextInputs([value], InputField(name, False))
    if value is None or value == []:
        raise invalid(name, "must not be empty: give a string, token ids, or an array of either")
    if not isinstance(value, list):
        raise body.wrong(name, "a string or an array")
    if not isinstance(value[0], str | list):
        return IdsInputs([whole_numbers(name, value)], InputField(name, False))
    check_count(name, len(value))
    if isinstance(value[0], str):
        return TextInputs(_strings(name, value), InputField(name))
    return IdsInputs([_ids(f"{name}[{i}]", item) for i, item in enumerate(value)], InputField(name))


def _ids(path: str, value: object) -> Sequence[int]:
    if not isinstance(value, list):
        raise invalid(path, f"must be an array of token ids as the others, got {kind(value)}")
    return whole_numbers(path, value)


def _texts(body: Fields, name: str) -> tuple[Sequence[str], bool]:
    """Return the texts in a field, and whether the field holds an array. A field holds one text or an array of texts. A
    text is a string, or an object with the field `text`."""
    value = body.values.get(name)
    if isinstance(value, str | dict):
        return _strings(name, [value], is_list=False), False
    if not isinstance(value, list):
        raise body.wrong(name, "a string or an array of strings")
    check_count(name, len(value))
    return _strings(name, value), True


def _strings(name: str, values: Sequence[object], is_list: bool = True) -> list[str]:
    out = []
    for i, value in enumerate(values):
        text = value.get("text") if isinstance(value, dict) else value
        if not isinstance(text, str):
            got = "an object without a text" if isinstance(value, dict) else kind(value)
            raise invalid(f"{name}[{i}]" if is_list else name, f"must be a string, got {got}")
        out.append(text)
    return out
