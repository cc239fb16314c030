"""A budget through the OpenAI client: what the cache held, a stream, a refusal.

    make serve                                      # or any server with --attention-backend express
    .venv/bin/python examples/openai_client.py      # --url http://localhost:8000/v1

What a budget may say: docs/budgets.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import openai

TEXT = (Path(__file__).resolve().parent.parent / "LICENSE").read_text()
MESSAGES = [{"role": "user", "content": TEXT + "\nSum this up."}]


def chat(client: openai.OpenAI, model: str, budget: dict, **more):
    return client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=40, temperature=0,
        extra_body={"express": budget}, **more,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://localhost:8000/v1")
    client = openai.OpenAI(base_url=parser.parse_args().url, api_key="none")
    model = client.models.list().data[0].id

    answer = chat(client, model, {"memory_tokens": 512})
    print(answer.choices[0].message.content)
    print("held:", answer.usage.express)

    stream = chat(
        client, model, {"memory": "10%"}, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:  # the last one has the usage of the whole call
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="")
    print("\nheld:", chunk.usage.express)

    try:
        chat(client, model, {"memory_tokens": 12})
    except openai.BadRequestError as error:
        print("refused:", error.body["message"])


if __name__ == "__main__":
    main()
