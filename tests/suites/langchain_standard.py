"""The standard suite of langchain-tests for chat models, run with LangChain's clients for both HTTP APIs (OpenAI's and
Anthropic's). It runs in the environment of the suites. TEST_API_BASE_URL is the address of the gateway."""

from __future__ import annotations

import os
from typing import Any

from langchain_anthropic import ChatAnthropic
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

ADDRESS = os.environ["TEST_API_BASE_URL"]
MODEL, OTHER = "toy", "another-toy"


class _Standard(ChatModelIntegrationTests):  # type: ignore[misc] # the types are not in our environment
    """Settings and steps that TestChatOpenAI and TestChatAnthropic share."""

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return OTHER

    @property
    def supported_usage_metadata_details(self) -> dict[str, Any]:
        details = ["reasoning_output", "cache_read_input"]
        return {"invoke": details, "stream": details}

    def invoke_with_reasoning_output(self, *, stream: bool = False) -> AIMessage:
        return self._invoke("Think before you answer.", stream)

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        return self._invoke("Hello " * 200, stream)

    def _invoke(self, text: str, stream: bool) -> AIMessage:
        model: BaseChatModel = self.chat_model_class(**self.chat_model_params)
        if not stream:
            return model.invoke(text)
        full = None
        for chunk in model.stream(text):
            full = chunk if full is None else full + chunk
        assert isinstance(full, AIMessage)
        return full


class TestChatOpenAI(_Standard):
    """LangChain's standard tests, run with LangChain's client of OpenAI's API."""

    @property
    def chat_model_class(self) -> Any:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": MODEL, "base_url": f"{ADDRESS}/v1", "api_key": "none", "stream_usage": True, "max_retries": 0}


class TestChatAnthropic(_Standard):
    """LangChain's standard tests, run with LangChain's client of Anthropic's API."""

    @property
    def chat_model_class(self) -> Any:
        return ChatAnthropic

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": MODEL, "base_url": ADDRESS, "api_key": "none", "max_tokens": 1000, "max_retries": 0}
