"""The request API without a server: fields, sizes, plans, usage, and how answers get it."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
from budgets import EQUAL, WIDE, resolve
from budgets import settings as server
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from express_vllm import schedules
from express_vllm.budget import FIELDS, on_grid
from express_vllm.config import ServerConfig
from express_vllm.edge import current
from express_vllm.fields import BudgetError, Fields, limited, parse
from express_vllm.kvsize import KVSize
from express_vllm.layers import Bounded, ModelLayers
from express_vllm.layout import layout_for
from express_vllm.server import routes
from express_vllm.server.answer import with_usage
from express_vllm.server.body import budget, check_duplicates, named, refuse_beam_search
from express_vllm.server.middleware import PATH, ExpressMiddleware, add_to
from express_vllm.server.page import HEADERS, PAGE
from express_vllm.server.plan import Capacity, attended, describe_server, plan
from express_vllm.server.settle import settled
from express_vllm.server.table import decision
from express_vllm.server.usage import Sequence, usage
from express_vllm.server.watch import CACHED, Call, watch
from express_vllm.settings import Settings

CONFIG = ServerConfig(memory_tokens=1024, max_memory_tokens=4096)
SIZE = EQUAL
#: An engine's pool, for a model whose layers all grow.
pool = partial(Capacity, layers=ModelLayers.equal(SIZE.layers))
MODEL = server(CONFIG).fields


def ask(express, *, config=CONFIG, prompt=6000, max_tokens=100, prefix="express."):
    _, arguments = budget({"express": express}, server(config).fields)
    return resolve(arguments, config, prompt_tokens=prompt, max_tokens=max_tokens, prefix=prefix)


# --- fields -------------------------------------------------------------------------------------


def test_every_field_of_the_object_is_a_vllm_xarg_and_documented():
    assert {f"express_{name}" for name in Fields.model_fields} == set(FIELDS)
    assert all(field.description for field in Fields.model_fields.values())


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "memory_tokens": st.integers(128, 4096),
            "compute_tokens": st.just(128),
            "seed": st.integers(0, 2**63 - 1),
            "mode": st.just("express"),
            "profile": st.sampled_from(["recent", "even"]),
            "pinned_tokens": st.just(3),
        },
    )
)
def test_the_object_and_vllm_xargs_are_the_same_budget(fields):
    xargs = {f"express_{name}": value for name, value in fields.items()}
    same = resolve(xargs, CONFIG, prompt_tokens=6000, max_tokens=100)
    assert ask(fields) == same


@pytest.mark.parametrize(
    ("express", "words"),
    [
        ({"memory_tokens": 12}, ["express.memory_tokens=12", "from 128 to 4096"]),
        ({"memory_tokens": 10**400}, ["express.memory_tokens=1000", "401 characters", "4096"]),
        ({"memory_tokens": 10**5000}, ["express.memory_tokens=<an integer of", "4096"]),
        ({"memory_tokens": "9" * 10**6}, ["express.memory_tokens='9999", "1000002 characters"]),
        ({"memory_tokens": math.nan}, ["express.memory_tokens=nan"]),
        ({"memory_tokens": {"a": [1]}}, ["express.memory_tokens={'a': [1]}"]),
        ({"memory_tokens": True}, ["express.memory_tokens=True"]),
        ({"compute_tokens": 4000}, ["express.compute_tokens=4000", "1024"]),
        ({"seed": -1}, ["express.seed=-1", "0 to 9223372036854775807"]),
        ({"mode": "fast"}, ["express.mode='fast'", "express, exact"]),
        ({"mode": "exact"}, ["express.mode='exact'", "6100", "4096", "express.mode='express'"]),
        ({"memry_tokens": 1}, ["express.memry_tokens=1", "did you mean express.memory_tokens?"]),
        ({"memory": 512}, ["express.memory=512", "did you mean express.memory_tokens?"]),
        ({"memory": "12 parsec"}, ["express.memory='12 parsec'", "'10%'", "MiB"]),
        ({"memory": "-5%"}, ["express.memory='-5%'"]),
        ({"memory": "1MiB"}, ["express.memory='1MiB'", "45 tokens", "128 to 4096 tokens", "bytes"]),
        ({"memory": "9TiB"}, ["express.memory='9TiB'", "4096 tokens"]),
        ({"memory": "99%"}, ["express.memory='99%'", "6039 tokens", "4096"]),
        ({"memory": "10%", "memory_tokens": 512}, ["express.memory_tokens=512", "one of them"]),
        (7, ["express=7", "JSON object"]),
    ],
)  # fmt: skip
def test_refusals_name_field_value_and_what_is_allowed(express, words):
    with pytest.raises(BudgetError) as error:
        ask(express)
    for word in words:
        assert word in str(error.value)
    assert len(str(error.value)) < 1000


def test_the_schema_shows_the_operators_limits():
    properties = MODEL.model_json_schema()["properties"]
    assert set(properties) == set(Fields.model_fields)
    integer = properties["memory_tokens"]["anyOf"][0]
    assert (integer["minimum"], integer["maximum"]) == (128, 4096)


def test_limits_hold_in_the_model_itself():
    with pytest.raises(BudgetError):
        parse({"memory_tokens": 1025}, limited(128, 128, 1024))
    assert parse({"memory_tokens": 1024}, limited(128, 128, 1024)).memory_tokens == 1024


# --- sizes --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(128, 4096))
def test_bytes_buy_whole_slots(slots):
    exactly = ask({"memory": f"{slots * SIZE.bytes_per_token}B"})
    just_less = {"memory": f"{slots * SIZE.bytes_per_token - 1}B"}
    assert exactly.memory_tokens == on_grid(slots)
    if slots > 128:
        assert ask(just_less).memory_tokens == on_grid(slots - 1)


@pytest.mark.parametrize(("text", "slots"), [("10%", 608), ("10 %", 608), ("12.5%", 736)])
def test_a_share_is_of_the_longest_that_the_request_can_grow(text, slots):
    """610 and 762 of 6,100, on the grid."""
    assert ask({"memory": text}).memory_tokens == slots


def test_a_share_of_a_short_request_is_at_least_the_minimum_and_then_exact():
    budget = ask({"memory": "1%"}, prompt=50, max_tokens=50)
    assert budget.memory_tokens == 128 and budget.exact


def test_memory_is_what_vllms_pages_take(model_path):
    from engines import engine_config
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    config = engine_config(model_path, attention_backend="express", dtype="bfloat16")
    equal = KVSize.of(config, ServerConfig(wide_layers=()), 30)
    spec = FullAttentionSpec(
        block_size=16, num_kv_heads=equal.kv_heads, head_size=equal.head_size,
        dtype=config.model_config.dtype,
    )  # fmt: skip
    assert spec.page_size_bytes * equal.layers == 16 * equal.bytes_per_token
    assert equal == SIZE
    wide = Settings.of(config).size  # 3 of 30 layers with 4 times the slots
    assert wide == WIDE and wide.bytes_per_token == equal.bytes_per_token
    block = spec.page_size_bytes * (27 + 3 * 4)
    assert block <= wide.tokens(16) * wide.bytes_per_token < block + wide.bytes_per_token


# --- usage and plans ----------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(128, 2048), st.integers(1, 8000), st.integers(1, 190))
def test_usage_is_the_layouts(memory, prompt, output):
    budget = ask({"memory_tokens": memory}, prompt=prompt, max_tokens=192)
    used = usage([Sequence(budget, prompt, output)], SIZE)
    stored = prompt + output - 1
    assert used["exact_kv_tokens"] == stored
    assert used["peak_kv_tokens"] == budget.reserved(stored) <= max(memory, 0)
    assert used["compactions"] == len(budget.layout.events(0, stored))
    if budget.exact:
        assert used["compactions"] == 0 and used["compression_ratio"] == 1


def test_compactions_of_cached_tokens_were_done_for_others():
    budget = ask({"memory_tokens": 256})
    cold, warm = Sequence(budget, 6000, 10), Sequence(budget, 6000, 10, cached=5000)
    done = [usage([sequence], SIZE)["compactions"] for sequence in (cold, warm)]
    assert done[0] - done[1] == budget.compactions(5000) > 0 < done[1]


def test_several_sequences_add_up():
    budget = ask({"memory_tokens": 256})
    one, other = Sequence(budget, 6000, 10), Sequence(budget, 6000, 60)
    used = usage([one, other], SIZE)
    assert used["sequences"] == 2 and used["memory_tokens"] == 256
    for name in ("peak_kv_tokens", "exact_kv_tokens", "compactions"):
        assert used[name] == usage([one], SIZE)[name] + usage([other], SIZE)[name]


@settings(deadline=None, max_examples=50)
@given(st.integers(167, 1500), st.integers(1, 6000), st.integers(1, 700))
def test_attended_is_the_mean_of_live_slots(memory, start, length):
    config = ServerConfig(wide_layers=(18, 20, 23))
    budget = resolve(
        {"express_memory_tokens": memory}, config, prompt_tokens=7000, max_tokens=900, size=WIDE
    )
    ordinary, wide = budget.layout, budget.layout_in(True)
    live = [
        (27 * ordinary.live(tokens) + 3 * wide.live(tokens)) / 30
        for tokens in range(start, start + length)
    ]
    found = attended(budget, server(config, size=WIDE), start, start + length)
    assert max(live) <= found.most <= memory
    assert found.mean == pytest.approx(sum(live) / length, abs=0.006)
    assert found.exact_mean == sum(range(start, start + length)) / length


@pytest.mark.parametrize("schedule", [schedules.Lazy, schedules.Paper])
def test_a_plan_walks_no_events_and_keeps_nothing_of_its_budget(monkeypatch, schedule):
    """At a million tokens some 30,000 events run, and every client may ask for another budget."""
    monkeypatch.delattr(schedule, "compact")
    length = 1 << 20
    config = ServerConfig(schedule=schedule.__name__.lower(), wide_layers=())
    layout_for.cache_clear()
    for memory in range(300, 5000, 7):
        budget = resolve(
            {"express_memory_tokens": memory}, config, prompt_tokens=64, max_tokens=length - 64,
            max_model_len=length,
        )  # fmt: skip
        if memory % 1000 < 7:
            found = plan(budget, server(config, length), pool(9, 64, 9), 64, length - 64)
            assert found.compactions > 1000 and found.attended_tokens.most <= found.memory_tokens
        budget.layout.live(length)
    assert layout_for.cache_info().currsize < 100, "budgets lie on a grid"


def test_a_plan_counts_blocks_bytes_and_how_many_fit():
    capacity = pool(159, 64, 12)
    budget = ask({"memory_tokens": 512}, prompt=6000, max_tokens=41)
    found = plan(budget, server(CONFIG), capacity, 6000, 41)
    assert found.blocks.model_dump() == {"planned": 8, "exact": math.ceil(6040 / 64)}
    assert found.bytes.planned == 512 * SIZE.bytes_per_token
    assert found.concurrent_requests.model_dump() == {"planned": 12, "exact": 1}
    assert capacity.fits(2000, 2000) == 159 // 32
    assert not found.error_bound.applies and found.error_bound.factor is None


def test_a_plan_counts_what_bounded_layers_hold():
    """Of three layers that grow, and fifteen with a window of 512: six block tables."""
    size, layers = KVSize(3, 1, 256, 2, "bfloat16"), ModelLayers((5, 11, 17), (Bounded(15, 512),))
    here = Settings(CONFIG, size, layers, SimpleNamespace(max_model_len=8192))
    capacity = Capacity(600, 64, 100, layers)
    budget = resolve({"express_memory_tokens": 512}, CONFIG, prompt_tokens=6000, max_tokens=41)
    found = plan(budget, here, capacity, 6000, 41)
    windows, exact = 5 * 9, math.ceil(6040 / 64)
    assert found.blocks.model_dump() == {"planned": 8 + windows, "exact": exact + windows}
    held = windows * 64 * 3 * size.bytes_in_layer
    assert found.bytes.planned == 512 * size.bytes_per_token + held
    assert found.bytes.exact == 6040 * size.bytes_per_token + held
    assert found.concurrent_requests.planned == 600 // (8 + windows)
    assert capacity.tokens(size) == 600 * 64


def test_the_papers_bound_is_given_for_the_papers_schedule():
    config = ServerConfig(schedule="paper", memory_tokens=1024)
    budget = ask({}, config=config)
    found = plan(budget, server(config), pool(9, 64, 9), 6000, 100).error_bound
    target = budget.shape.target
    assert found.applies and found.coreset_tokens == target
    assert found.factor == pytest.approx(2 * math.sqrt(math.log2(target) + 6), abs=1e-3)


def test_the_description_can_be_sent_as_json():
    found = describe_server(server(CONFIG), pool(159, 64, 12), MODEL)
    again = json.loads(json.dumps(found))
    assert again["limits"] == {
        "min_memory_tokens": 128, "max_memory_tokens": 4096, "max_model_len": 8192,
    }  # fmt: skip
    assert again["bytes_per_token"] == 23040 and again["pool"]["kv_tokens"] == 159 * 64


def test_a_model_that_is_too_short_to_be_thinned_has_no_shape():
    here = server(max_model_len=100)
    found = describe_server(here, pool(159, 64, 12), here.fields)
    assert found["shape"] is None and found["limits"]["max_model_len"] == 100
    assert found["limits"]["max_memory_tokens"] == 128, "what a request may say"


# --- bodies and answers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b'{"express": {"seed": 1, "seed": 2}}', "express.seed=2"),
        (b'{"express": {"seed": 1}, "model": "m", "express": {}}', "express='...'"),
    ],
)
def test_a_key_given_twice_is_refused(body, word):
    with pytest.raises(BudgetError, match="given twice") as error:
        check_duplicates(body)
    assert word in str(error.value) and error.value.reason == "duplicate"


def test_other_doubled_keys_are_vllms_business():
    check_duplicates(b'{"a": 1, "a": 2, "express": {"seed": 1}, "b": {"seed": 1, "seed": 2}}')


XARGS = {"express_seed": 3, "other": 1}
PLACES = [
    {"express": {"seed": 3}},
    {"vllm_xargs": XARGS},
    {"sampling_params": {"extra_args": XARGS}},
]


@pytest.mark.parametrize("body", PLACES)
def test_a_budget_is_found_wherever_a_body_may_have_it(body):
    prefix, fields = budget({"model": "m", **body}, MODEL)
    assert fields == {"express_seed": 3}, "what is not ours stays where it is"
    assert prefix == ("express." if "express" in body else "express_")


@pytest.mark.parametrize("first", range(3))
@pytest.mark.parametrize("second", range(3))
def test_a_budget_in_two_places_is_refused(first, second):
    if first == second:
        return
    with pytest.raises(BudgetError, match="seed too; name the budget in one place") as error:
        budget({**PLACES[first], **PLACES[second]}, MODEL)
    assert error.value.reason == "conflict"


@pytest.mark.parametrize(
    "body", [None, [], "text", 7, {}, {"express": None}, {"vllm_xargs": {"other": 1}},
             {"vllm_xargs": None}, {"vllm_xargs": "{"}, {"sampling_params": [1]}],
)  # fmt: skip
def test_bodies_without_a_budget_name_none(body):
    assert list(named(body)) == [] and budget(body, MODEL)[1] == {}


def test_a_form_has_vllm_xargs_as_text():
    assert budget({"vllm_xargs": '{"express_seed": 3}'}, MODEL) == ("express_", {"express_seed": 3})


@pytest.mark.parametrize("asked", [True, 1, "true", "no", [], {}])
def test_beam_search_is_refused_with_a_budget_or_without(asked):
    with pytest.raises(BudgetError, match="it must be false") as error:
        refuse_beam_search({"use_beam_search": asked})
    assert error.value.reason == "beam_search"


@pytest.mark.parametrize("body", [{}, {"use_beam_search": False}, {"use_beam_search": None}, []])
def test_other_searches_are_not_refused(body):
    refuse_beam_search(body)


def answered(response):
    done = []
    wrapped = with_usage(response, lambda: {"peak_kv_tokens": 7}, lambda: done.append(1))
    return wrapped, done


def test_a_json_answer_gets_usage_and_keeps_its_headers():
    plain = JSONResponse({"usage": {"total_tokens": 1}}, headers={"x-test": "1"})
    wrapped, done = answered(plain)
    assert json.loads(wrapped.body)["usage"]["express"] == {"peak_kv_tokens": 7}
    assert wrapped.headers["x-test"] == "1" and done == [1]
    assert int(wrapped.headers["content-length"]) == len(wrapped.body)


def test_errors_and_answers_without_usage_are_left_alone():
    for plain in (JSONResponse({"error": {}}, 400), JSONResponse({"data": []})):
        assert answered(plain)[0] is plain


def stream(*chunks, fail=False):
    async def produce():
        for chunk in chunks:
            yield chunk
        if fail:
            raise RuntimeError("cut off")

    async def collect():
        response, done = answered(StreamingResponse(produce()))
        found = []
        try:
            async for chunk in response.body_iterator:
                found.append(chunk)
        except RuntimeError:
            pass
        return found, done

    return asyncio.run(collect())


def test_only_the_last_usage_of_a_stream_gets_express():
    chunks = [
        'data: {"choices":[{"delta":{"content":"\\"usage\\":{"}}],"usage":null}\n\n',
        'data: {"choices":[{"delta":{}}],"usage":{"total_tokens":1}}\n\n',
        'data: {"choices":[],"usage":{"total_tokens":2}}\n\n',
        "data: [DONE]\n\n",
    ]
    found, done = stream(*chunks)
    assert [found[0], found[1], found[3]] == [chunks[0], chunks[1], chunks[3]]
    last = json.loads(found[2][6:])
    assert last["usage"] == {"total_tokens": 2, "express": {"peak_kv_tokens": 7}}
    assert found[2].endswith("\n\n") and done == [1]


def test_usage_that_is_there_already_is_left_alone():
    plain = JSONResponse({"usage": {"express": {"peak_kv_tokens": 1}}})
    assert answered(plain)[0] is plain


def test_the_last_event_of_a_message_gets_it():
    event = {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 2}}
    start = {"type": "message_start", "message": {"usage": {"output_tokens": 0}}}
    found, _ = stream(*(f"event: x\ndata: {json.dumps(e)}\n\n" for e in (start, event)))
    assert "peak_kv_tokens" not in found[0] and found[1].startswith("event: x\ndata: ")
    assert json.loads(found[1].partition("data: ")[2])["usage"]["express"]["peak_kv_tokens"] == 7


def test_a_stream_that_breaks_still_ends_the_call():
    assert stream("data: x\n\n", fail=True)[1] == [1]


# --- streams that start before the engine is asked -----------------------------------------------

BUDGET = ask({"memory_tokens": 256})


class Engine:
    """An engine client that refuses what is asked for by the id "refused"."""

    async def generate(self, prompt, sampling_params, request_id, **kwargs):
        self.params = sampling_params
        await asyncio.sleep(0)
        if request_id == "refused":
            raise BudgetError("express.memory", "1KiB", "too small")
        current.get().admitted(request_id, BUDGET, 6000, sampling_params.n)
        for _ in range(3):
            of_each = {"token_ids": [1], CACHED: 0}
            tokens = [SimpleNamespace(index=i, **of_each) for i in range(sampling_params.n)]
            yield SimpleNamespace(outputs=tokens)


def params(n=1, **more):
    kind = SimpleNamespace(name="DELTA")
    return SimpleNamespace(n=n, output_kind=kind, extra_args={"other": 1}, **more)


def settle(*names, swallow=False, eager=True, leave=False, fields=None):
    """Stream what a watched engine gives for these requests; -> (chunks, call, log).

    As vLLM does: `eager` asks before the stream starts, `swallow` makes an event of an error.
    """
    log, engine = [], Engine()
    watch(engine)

    async def produce(call):
        try:
            yield "created"
            outputs = call.outputs or [engine.generate("x", params(), name) for name in names]
            try:
                for output in outputs:
                    async for _ in output:
                        yield "token"
            except BudgetError:
                if not swallow:
                    raise
                yield "error"
        finally:
            log.append("closed")

    async def run():
        call = Call("/v1/completions", SIZE, fields=fields or {})
        current.set(call)
        call.outputs = [engine.generate("x", params(), n) for n in names] if eager else []
        stream = await settled(produce(call), call)
        log.append("started")
        found = []
        async for chunk in stream:
            found.append(chunk)
            if leave:
                await stream.aclose()
                break
        return found, call

    return *asyncio.run(run()), log, engine


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("swallow", [True, False])
@pytest.mark.parametrize("names", [["refused"], ["refused", "good"]])
def test_a_late_refusal_comes_before_the_stream(names, swallow, eager):
    """Also where vLLM makes an event of it."""
    with pytest.raises(BudgetError):
        settle(*names, swallow=swallow, eager=eager)


@pytest.mark.parametrize("swallow", [True, False])
def test_a_stream_waits_for_all_that_was_asked_before_it_started(swallow):
    with pytest.raises(BudgetError):
        settle("good", "refused", swallow=swallow)


@pytest.mark.parametrize("eager", [True, False])
def test_a_stream_is_passed_on_once_the_engine_was_asked(eager):
    found, call, log, _ = settle("good", eager=eager)
    assert found == ["created", "token", "token", "token"] and log == ["started", "closed"]
    (sequence,) = call.sequences
    assert (sequence.prompt, sequence.output, sequence.done) == (6000, 3, True)
    assert call.finished and list(call.recent) == [call] and call.usage()["sequences"] == 1


def test_a_client_that_leaves_early_closes_the_stream():
    found, _, log, _ = settle("good", leave=True)
    assert found == ["created"] and log == ["started", "closed"]


def test_a_stream_that_never_asks_is_passed_on_too():
    found, call, *_ = settle(eager=False)
    assert found == ["created"] and call.usage() is None


def test_the_budget_travels_beside_vllms_handlers():
    engine = settle("good", fields={"express_seed": 3})[-1]
    assert engine.params.extra_args == {"other": 1, "express_seed": 3}
    assert settle("good")[-1].params.extra_args == {"other": 1}


def test_nobody_is_followed_outside_a_call():
    engine = Engine()
    watch(engine)

    async def run():
        heard = []
        current.set(SimpleNamespace(admitted=lambda *args: heard.append(args)))
        assert len([x async for x in engine.generate("x", params(n=2), "good")]) == 3
        return heard

    assert asyncio.run(run()) == [("good", BUDGET, 6000, 2)]


# --- how it gets into the server ----------------------------------------------------------------


def test_the_middleware_is_a_default_of_vllms_parser_and_keeps_the_users():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    assert parser.parse_args([]).middleware == [PATH]
    assert parser.parse_args(["--middleware", "a.b"]).middleware == [PATH, "a.b"]
    add_to(parser)
    assert parser.parse_args([]).middleware == [PATH], "once, however often it is asked"


def application(backend):
    """A FastAPI application with our middleware and as much of vLLM's state as decides about it."""
    app = FastAPI()
    app.add_middleware(ExpressMiddleware)
    attention = SimpleNamespace(backend=SimpleNamespace(name=backend), backend_per_kind={})
    app.state.vllm_config = SimpleNamespace(attention_config=attention)
    app.state.engine_client = object()
    return app


def test_a_server_without_express_is_left_alone():
    app = application("CPU_ATTN")
    before = list(app.routes)
    with TestClient(app) as client:
        assert client.get("/express").status_code == 404
        assert client.get("/v1/express/config").status_code == 404
    assert list(app.routes) == before


def test_a_server_does_not_start_without_what_was_asked_of_it():
    """An error while the routes are added must not leave a server that ignores budgets."""
    with pytest.raises(AttributeError), TestClient(application("EXPRESS")):
        pass


def wrapped_application(answer):
    """vLLM's error handlers, and a route that is busy, which answers through `answer`."""
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

    app = FastAPI()
    app.state.args = SimpleNamespace(log_error_stack=False)
    init_exception_handler(app)

    @app.post("/v1/new")
    async def busy(request: Request):
        raise HTTPException(503, "busy")

    (route,) = [route for route in app.routes if route.path == "/v1/new"]
    routes._wrap(route, answer)
    return TestClient(app)


def test_only_a_body_that_cannot_be_read_is_told_so():
    client = wrapped_application(routes._readable)
    json_type = {"Content-Type": "application/json"}
    assert client.post("/v1/new", json={}).json()["error"]["message"] == "busy"
    assert client.post("/v1/new", content=b"{", headers=json_type).status_code == 503, "FastAPI's"
    for content in (b"[" * 10**5, b'{"seed": ' + b"9" * 5000 + b"}", b'{"a": "\xff"}'):
        answer = client.post("/v1/new", content=content, headers=json_type)
        assert answer.status_code == 400
        assert "JSON object that Python can read" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "sent",
    [
        {"json": {"express": {"seed": 1}}}, {"json": {"vllm_xargs": {"express_seed": 1}}},
        {"data": {"express": "{}"}}, {"data": {"vllm_xargs": '{"express_seed": 1}'}},
    ],
)  # fmt: skip
def test_a_route_that_nobody_decided_about_takes_no_budget(sent):
    client = wrapped_application(partial(routes._answer, None, decision("/v1/new")))
    answer = client.post("/v1/new", **sent)
    assert answer.status_code == 400 and "takes no budget" in answer.json()["error"]["message"]
    assert client.post("/v1/new", json={"vllm_xargs": {"other": 1}}).status_code == 503


def test_the_page_is_self_contained_and_its_policy_says_so():
    for outside in ("http://", "https://", "src=", "@import", "url("):
        assert outside not in PAGE
    policy = HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy and policy.count("sha256-") == 2
    assert ' style="' not in PAGE and "onclick" not in PAGE, "the policy blocks inline attributes"


def test_vllms_state_and_handlers_are_where_we_look():
    """Names of vLLM's that are not part of a documented interface."""
    from vllm.engine.protocol import EngineClient
    from vllm.entrypoints.generate import api_router
    from vllm.entrypoints.launchers.api_server import app_state

    state = inspect.getsource(app_state)
    assert "state.engine_client = engine_client" in state
    assert "state.vllm_config = vllm_config" in state
    assert "state.openai_serving_responses =" in inspect.getsource(api_router)
    names = list(inspect.signature(EngineClient.generate).parameters)[:4]
    assert names == ["self", "prompt", "sampling_params", "request_id"]


def test_vllms_responses_are_kept_where_we_look():
    from vllm.entrypoints.openai.responses.protocol import ResponsesResponse, ResponseUsage
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    assert inspect.iscoroutinefunction(OpenAIServingResponses.responses_full_generator)
    source = inspect.getsource(OpenAIServingResponses)
    for name in ("background_tasks", "response_store", "msg_store", "event_store"):
        assert f"self.{name}: dict" in source
    assert 'sub_request_id = f"{request_id}_{sub_request}"' in source
    assert ResponsesResponse.model_fields["usage"].annotation == ResponseUsage | None
    assert ResponseUsage.model_config["extra"] == "allow"
