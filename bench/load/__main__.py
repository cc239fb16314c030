"""Load a running server through its public API and compare express with exact attention.

    make serve                                       # in another terminal
    python -m bench.load --rate 0.5 --requests 60

Requests arrive as a Poisson process that does not wait for answers (open loop). The same requests
are sent twice, at the same times: with their budgets, and with mode `exact`. Both go to the same
server, or the exact ones to --exact-url, which need not run express. The mix is chat, documents of
8K to 32K tokens and long answers; --scale shrinks all lengths, by default so that they fit the
model. Stored: bench/results/speed/NAME.json and NAME.png.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import time
from typing import Any

from tqdm import tqdm

from ..record import RESULTS, save, table
from .client import Client, Outcome, chars_per_token, find_model, find_style
from .mix import KINDS, LONGEST, Request, exact, plan, text
from .report import Objective, Run, plot, summary
from .watch import Watch


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--url", default="http://localhost:8000", help="server with express (%(default)s)")
    add("--exact-url", metavar="URL", help="server for the exact requests; by default --url")
    add("--only", choices=("express", "exact"), help="one pass instead of two")
    add("--model", help="by default the first that the server lists")
    add("--rate", type=float, default=0.5, help="arrivals per second (%(default)s)")
    add("--requests", type=int, default=60, help="how many (%(default)s)")
    add("--mix", default=",".join(KINDS), help="kinds of requests: %(default)s")
    add("--budgets", default="default,512,1024,2048",
        help="memory_tokens, drawn uniformly; 'default' sends none (%(default)s)")  # fmt: skip
    add("--greedy", type=float, default=0.0, metavar="SHARE",
        help="share of requests that ask for too much and must be refused")  # fmt: skip
    add("--rounds", type=int, default=1,
        help="passes of each mode, in turns that change their order: for a machine that is not "
        "alone; each round has a seed and --requests of its own")  # fmt: skip
    add("--scale", type=float, help="of all lengths; by default 1, or less to fit the model")
    add("--seed", type=int, default=0, help="of arrivals, kinds, texts and budgets (%(default)s)")
    add("--slo-ttft", type=float, default=5.0, metavar="S",
        help="goodput counts requests with a first token within this (%(default)s)")  # fmt: skip
    add("--slo-tpot", type=float, default=0.2, metavar="S",
        help="and with a mean time per later token of at most this (%(default)s)")  # fmt: skip
    add("--timeout", type=float, default=600.0, metavar="S", help="of a request (%(default)s)")
    add("--style", choices=("auto", "express", "vllm_xargs"), default="auto",
        help="how budgets are sent: the express object, or vLLM's extra field")  # fmt: skip
    add("--api-key", default=os.environ.get("OPENAI_API_KEY", "none"), help="$OPENAI_API_KEY")
    add("--hardware", help="of the server, for the record; by default this machine's")
    add("--name", default="load", help="of the result (%(default)s)")
    return parser.parse_args()


async def drive(name: str, client: Client, requests: list[Request]) -> Run:
    """Send every request at its time, wait for all answers."""
    watch = Watch(client.url)
    watching = asyncio.create_task(watch.run())
    start = time.perf_counter()
    bar = tqdm(total=len(requests), desc=f"{name:8}", unit="request")
    counts = {"finished": 0, "refused": 0, "turned away": 0, "failed": 0}

    async def one(request: Request) -> Outcome:
        await asyncio.sleep(max(0.0, request.at - (time.perf_counter() - start)))
        outcome = await client.send(request, time.perf_counter() - start)
        counts[outcome.status] += 1
        bar.set_postfix({k: v for k, v in counts.items() if v})
        bar.update()
        return outcome

    outcomes = list(await asyncio.gather(*(one(request) for request in requests)))
    seconds = time.perf_counter() - start
    await asyncio.sleep(watch.interval)
    watching.cancel()
    bar.close()
    return Run.of(name, outcomes, watch, seconds)


def budgets(text: str) -> list[dict[str, Any]]:
    return [{} if word == "default" else {"memory_tokens": int(word)} for word in text.split(",")]


def load_of(name: str, requests: list[Request], knows_modes: bool) -> list[Request]:
    """What a pass sends; a server without express knows no modes and refuses no budget."""
    if name == "express":
        return requests
    if knows_modes:
        return [exact(request) for request in requests]
    return [dataclasses.replace(request, budget={}) for request in requests if not request.greedy]


async def run(o: argparse.Namespace) -> tuple[list[Run], dict[str, Any]]:
    urls = {"express": o.url.rstrip("/"), "exact": (o.exact_url or o.url).rstrip("/")}
    names = [o.only] if o.only else list(urls)
    clients = {}
    length = 1 << 30
    for name in names:
        model, longest = await find_model(urls[name], o.api_key)
        length = min(length, longest)
        style = o.style if o.style != "auto" else await find_style(urls[name], o.api_key)
        clients[name] = Client(urls[name], o.model or model, style, o.api_key, o.timeout)
    scale = o.scale or min(1.0, round(length / (LONGEST * 1.05), 3))
    first = clients[names[0]]
    for client in clients.values():
        # Each server is warmed up; the tokenizer is the same.
        ratio = await chars_per_token(client, text())
    print(f"{first.model}: {o.rounds} x {o.requests} requests, {o.rate}/s, lengths x {scale}, "
          f"budgets as {first.style}")  # fmt: skip
    runs: dict[str, Run] = {}
    for number in range(o.rounds):
        requests = plan(
            requests=o.requests, rate=o.rate, kinds=o.mix.split(","), budgets=budgets(o.budgets),
            greedy=o.greedy, scale=scale, chars_per_token=ratio, seed=o.seed + number,
        )  # fmt: skip
        for name in names if number % 2 == 0 else names[::-1]:
            done = await drive(name, clients[name], load_of(name, requests, o.exact_url is None))
            if name in runs:
                runs[name].add(done)
            else:
                runs[name] = done
    for client in clients.values():
        await client.close()
    return [runs[name] for name in names], {
        "model": first.model,
        "scale": scale,
        "style": first.style,
    }


def main() -> None:
    o = options()
    runs, details = asyncio.run(run(o))
    objective = Objective(o.slo_ttft, o.slo_tpot)
    rows = [summary(run, None, objective) for run in runs]
    kinds = [summary(run, kind, objective) for kind in o.mix.split(",") for run in runs]
    print(table(rows), table(kinds), sep="\n\n")
    for run_ in runs:
        for error in sorted({x.error for x in run_.outcomes if x.status == "failed"}):
            print(f"failed, {run_.name}: {error}")
    more = {"hardware": o.hardware} if o.hardware else {}
    path = save(
        f"speed/{o.name}", rows, **details, **more, by_kind=kinds,
        slo=dataclasses.asdict(objective),
        requests={r.name: [dataclasses.asdict(x) for x in r.outcomes] for r in runs},
        metrics={r.name: r.points for r in runs},
    )  # fmt: skip
    print(path)
    title = (f"{details['model']}: {o.rounds} x {o.requests} requests at {o.rate}/s (Poisson), "
             f"lengths x {details['scale']}")  # fmt: skip
    try:
        plot(runs, objective, RESULTS / f"speed/{o.name}.png", title)
        print(RESULTS / f"speed/{o.name}.png")
    except ImportError:
        print("no plot: pip install matplotlib")


if __name__ == "__main__":
    main()
