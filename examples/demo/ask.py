"""The OpenAI client's side of the demo: answers, a streamed answer, tokens per second."""

import asyncio
import time
from dataclasses import dataclass

from openai import AsyncOpenAI, OpenAI

MODEL = "demo"
CONCURRENT = 32
SPEED_REQUESTS, SPEED_TOKENS = 32, 48


@dataclass(frozen=True)
class Server:
    """A running server by its role in the comparison."""

    name: str
    url: str


def answers(server: Server, questions: list[str]) -> list[str]:
    """The greedy answer to each question, as a chat message."""
    return asyncio.run(_answers(server, questions))


async def _answers(server: Server, questions: list[str]) -> list[str]:
    gate = asyncio.Semaphore(CONCURRENT)
    async with AsyncOpenAI(base_url=server.url, api_key="none") as client:

        async def ask(question: str) -> str:
            async with gate:
                reply = await client.chat.completions.create(
                    model=MODEL,
                    messages=[{"role": "user", "content": question}],
                    temperature=0,
                    max_tokens=24,
                )
            return (reply.choices[0].message.content or "").strip().split("\n")[0]

        return await asyncio.gather(*map(ask, questions))


def streamed(server: Server, question: str) -> list[str]:
    """One answer as the pieces in which it arrives."""
    chunks = OpenAI(base_url=server.url, api_key="none").chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=24,
        stream=True,
    )
    return [piece for chunk in chunks if chunk.choices and (piece := chunk.choices[0].delta.content)]


def tokens_per_second(server: Server, prompts: list[str]) -> float:
    """Output tokens per second of SPEED_REQUESTS concurrent requests for SPEED_TOKENS tokens each.

    The same requests run once unmeasured before: for a moment after a server has worked, its threads keep
    the cores busy waiting, which would be charged to the other one.
    """
    asyncio.run(_tokens_and_seconds(server, prompts[:SPEED_REQUESTS]))
    tokens, seconds = asyncio.run(_tokens_and_seconds(server, prompts[:SPEED_REQUESTS]))
    return tokens / seconds


async def _tokens_and_seconds(server: Server, prompts: list[str]) -> tuple[int, float]:
    async with AsyncOpenAI(base_url=server.url, api_key="none") as client:

        async def complete(prompt: str) -> int:
            reply = await client.completions.create(
                model=MODEL,
                prompt=prompt,
                temperature=0,
                max_tokens=SPEED_TOKENS,
                extra_body={"ignore_eos": True},
            )
            return reply.usage.completion_tokens

        start = time.perf_counter()
        tokens = await asyncio.gather(*map(complete, prompts))
        return sum(tokens), time.perf_counter() - start
