"""Ask the cluster that `make demo` started: the typed SDK in ten lines."""

from cluster.client import Client

with Client("localhost:50051") as client:
    stream = client.stream_chat("default", "What is the capital of France?", temperature=0)
    for text in stream:
        print(text, end="", flush=True)
    print(f"\n{stream.usage.completion_tokens if stream.usage else 0} tokens, {stream.finish_reason}")
