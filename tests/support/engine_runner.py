"""Runs jobs on a real vLLM engine in a process of its own: JSON in on stdin, JSON out on a file.

The engine core lives in this process, so that jobs can read the scheduler's own block accounting;
several ranks are processes of their own.  `engines.run_engine` starts it.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections import defaultdict
from types import SimpleNamespace

JOB = json.load(sys.stdin) if __name__ == "__main__" else {}
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
if JOB.get("interpret"):
    # Model Runner V2 on a CPU: Triton's interpreter stands in for the backend that vLLM looks for.
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


class Engine:
    """A vLLM `LLM` plus its scheduler's accounting."""

    def __init__(self, arguments):
        from vllm import LLM

        self.llm = LLM(disable_log_stats=True, **arguments)
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        self._watch()
        self.started = _allocated()

    def _watch(self):
        scheduler = self.scheduler
        self.pool = scheduler.kv_cache_manager.block_pool
        managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        self.manager = getattr(scheduler, "express_manager", managers[0])
        self.peaks = defaultdict(int)
        self.group_peaks = {}  # by class of the manager, the most blocks of a request in a group
        self.preemptions = 0
        self.computed = 0
        schedule, preempt = scheduler.schedule, scheduler._preempt_request

        def watched_schedule(*args, **kwargs):
            output = schedule(*args, **kwargs)
            for name, blocks in self.manager.req_to_blocks.items():
                self.peaks[name] = max(self.peaks[name], len(blocks))
            for manager in managers:
                held = [[b for b in x if not b.is_null] for x in manager.req_to_blocks.values()]
                most = max(map(len, held), default=0)
                kind = type(manager).__name__
                self.group_peaks[kind] = max(self.group_peaks.get(kind, 0), most)
            self.computed += output.total_num_scheduled_tokens
            return output

        def watched_preempt(*args, **kwargs):
            self.preemptions += 1
            return preempt(*args, **kwargs)

        scheduler.schedule, scheduler._preempt_request = watched_schedule, watched_preempt

    def generate(self, requests, max_batched_tokens=None):
        """All `requests` in one batch -> tokens, texts and accounting."""
        from vllm import SamplingParams

        if max_batched_tokens:
            self.scheduler.max_num_scheduled_tokens = max_batched_tokens
        params = [
            SamplingParams(
                temperature=r.get("temperature", 0),
                seed=r.get("seed"),
                max_tokens=r["max_tokens"],
                ignore_eos=r.get("ignore_eos", True),
                extra_args=r.get("extra_args"),
                logprobs=2 if r.get("margin") else None,
            )
            for r in requests
        ]
        prompts = [{"prompt_token_ids": r["prompt"]} for r in requests]
        self.peaks.clear()
        self.group_peaks.clear()
        self.preemptions = 0
        free = self.pool.get_num_free_blocks()
        adapters = [adapter(r["lora"]) if "lora" in r else None for r in requests]
        outputs = self.llm.generate(prompts, params, use_tqdm=False, lora_request=adapters)
        return {
            "tokens": [list(o.outputs[0].token_ids) for o in outputs],
            "texts": [o.outputs[0].text for o in outputs],
            "margins": [margins(o.outputs[0].logprobs) for o in outputs],
            "peak_blocks": max(self.peaks.values()),
            "peaks": list(self.peaks.values()),  # in the order of the requests
            "group_peaks": dict(self.group_peaks),
            "preemptions": self.preemptions,
            "leaked": free - self.pool.get_num_free_blocks(),
            "budgets_left": len(getattr(self.scheduler, "express_budgets", {})),
        }

    def alone(self, requests, **kwargs):
        results = [self.generate([r], **kwargs) for r in requests]
        return {
            "tokens": [r["tokens"][0] for r in results],
            "texts": [r["texts"][0] for r in results],
            "margins": [r["margins"][0] for r in results],
            "peak_blocks": [r["peak_blocks"] for r in results],
        }

    def conversations(self, nodes, batches, least_gain=None, cold=False):
        """Run `nodes` in `batches` of (their numbers, tokens of a step).

        A node's prompt is that of its `parent`, the first `kept` tokens of the parent's answer, and
        `new` tokens.  It is aborted after `steps` steps, if it has some.  -> by node, its answer,
        the gaps of its best two log-probabilities, and the tokens of its prompt that were cached.
        `cold`: what is cached is forgotten before each batch.
        """
        from vllm import SamplingParams

        from express_vllm.scheduler import prefixes, reuse

        if least_gain is not None:
            prefixes.LEAST_GAIN = reuse.LEAST_GAIN = least_gain
        engine, found = self.llm.llm_engine, {}
        self.preemptions = 0
        for numbers, size in batches:
            assert not cold or self.llm.reset_prefix_cache()
            self.scheduler.max_num_scheduled_tokens = size
            ends = {}
            for i in numbers:
                node = nodes[i]
                parent = found.get(node["parent"], {"prompt": [], "tokens": []})
                prompt = parent["prompt"] + parent["tokens"][: node["kept"]] + node["new"]
                found[i] = {"prompt": prompt, "tokens": [], "margins": [], "cached": 0}
                params = SamplingParams(
                    temperature=node["temperature"], seed=node["seed"], ignore_eos=True,
                    max_tokens=node["max_tokens"], extra_args=node["extra_args"], logprobs=2,
                )  # fmt: skip
                lora = adapter(node["lora"]) if node.get("lora") else None
                engine.add_request(
                    str(i), {"prompt_token_ids": prompt}, params, lora_request=lora
                )  # fmt: skip
                ends[i] = node["steps"] or 1 << 30
            steps = 0
            while engine.has_unfinished_requests():
                steps += 1
                for output in engine.step():
                    answer = output.outputs[0]
                    found[int(output.request_id)] |= {
                        "tokens": list(answer.token_ids), "margins": margins(answer.logprobs),
                        "cached": output.num_cached_tokens,
                    }  # fmt: skip
                engine.abort_request([str(i) for i, end in ends.items() if end == steps])
        engine.step()
        return {
            "nodes": [found[i] for i in range(len(nodes))],
            "preemptions": self.preemptions,
            "free": self.pool.get_num_free_blocks(),
            "states": len(getattr(self.manager, "states", ())),
            "budgets_left": len(getattr(self.scheduler, "express_budgets", {})),
            "usable": all(b.ref_cnt == 0 for b in self.pool.blocks if not b.is_null),
        }

    def copied_state(self, prompt, extra_args):
        """Two requests, of which the second is the first with one token more: the slots of each
        layer in which the second's blocks differ from the state, once that token is stored."""
        from vllm import SamplingParams

        worker = self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
        caches = worker.worker.model_runner.kv_caches
        engine = self.llm.llm_engine
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, extra_args=extra_args)
        longer = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, extra_args=extra_args)
        self.llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
        states = self.manager.states
        (state,) = [s for s in set(states._owner.values()) if s.tokens == len(prompt) and s.whole]
        engine.add_request("copy", {"prompt_token_ids": [*prompt, 5]}, longer)
        outputs = engine.step() or engine.step()
        (name,) = self.manager.req_to_blocks
        mine = [b.block_id for b in self.manager.req_to_blocks[name]][: len(state.blocks)]
        theirs = [b.block_id for b in state.blocks]
        differing = [int((cache[mine] != cache[theirs]).any(-1).any(1).sum()) for cache in caches]
        engine.abort_request(["copy"])
        engine.step()
        return {"differing": differing, "cached": outputs[0].num_cached_tokens if outputs else 0}

    def samples(self, prompt, n, **parameters):
        """One request of `n` sequences -> by sequence, its tokens and how many of its prompt were
        cached; and how many tokens were computed for all of them."""
        from vllm import SamplingParams

        params = SamplingParams(n=n, ignore_eos=True, **parameters)
        self.computed = 0
        (output,) = self.llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
        return {
            "tokens": [list(part.token_ids) for part in output.outputs],
            "cached": [part.express_cached_tokens for part in output.outputs],
            "computed": self.computed,
        }

    def reset(self):
        """Forget what is cached -> whether vLLM says so; blocks with a hash, and states that are
        whole, before and after."""

        def counts():
            states = set(self.manager.states._owner.values())
            hashed = sum(block.block_hash is not None for block in self.pool.blocks)
            return [hashed, sum(state.whole for state in states)]

        before = counts()
        return {"done": self.llm.reset_prefix_cache(), "before": before, "after": counts()}

    def first_slots(self, prompt, first, second, count, kv_heads):
        """A prompt under two budgets, `first` and `second`: for each layer, in how many of the
        first `count` slots the caches differ once it is computed, and in how many of the next
        100; and how many of its tokens were cached each time."""
        from vllm import SamplingParams

        from express_vllm.backend.pages import slot_pages

        engine, found, cached = self.llm.llm_engine, [], []
        worker = engine.engine_core.engine_core.model_executor.driver_worker
        for extra in (first, second):
            params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, extra_args=extra)
            engine.add_request("slots", {"prompt_token_ids": prompt}, params)
            while not (outputs := engine.step()):
                pass
            ((_, blocks),) = self.manager.req_to_blocks.items()
            mine = [block.block_id for block in blocks]
            pages = [slot_pages(x, kv_heads)[mine] for x in worker.worker.model_runner.kv_caches]
            found.append([page.transpose(0, 1).flatten(1, 2)[:, : count + 100] for page in pages])
            cached.append(outputs[0].num_cached_tokens)
            engine.abort_request(["slots"])
            engine.step()
        apart = [((a - b).abs() > 1e-4).any(-1).any(0) for a, b in zip(*found, strict=True)]
        return {
            "differing": [int(slots[:count].sum()) for slots in apart],
            "others": [int(slots[count:].sum()) for slots in apart], "cached": cached,
        }  # fmt: skip

    def aborts(self, requests, steps):
        """Add each request, run its number of steps, abort it; -> free blocks before and after."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        before = self.pool.get_num_free_blocks()
        held = []
        for number, (request, count) in enumerate(zip(requests, steps, strict=True)):
            params = SamplingParams(
                temperature=0, max_tokens=64, ignore_eos=True, extra_args=request.get("extra_args")
            )
            name = f"abort-{number}"
            engine.add_request(name, {"prompt_token_ids": request["prompt"]}, params)
            for _ in range(count):
                engine.step()
            held.append(before - self.pool.get_num_free_blocks())
            engine.abort_request([name])
            engine.step()
        return {
            "before": before,
            "after": self.pool.get_num_free_blocks(),
            "held": held,
            "budgets_left": len(self.scheduler.express_budgets),
        }

    def device_memory(self):
        """Bytes that torch held when the engine had started, the most since then, and the most
        that profiling found a step to need beside what stays."""
        import torch

        executor = self.llm.llm_engine.engine_core.engine_core.model_executor
        return {
            "started": self.started, "peak": torch.cuda.max_memory_allocated(),
            "profiled": executor.driver_worker.worker.peak_activation_memory,
        }  # fmt: skip

    def compaction_seconds(self, length, max_tokens):
        """What the scheduler was told of one request of made-up tokens."""
        request = {"prompt": [i % 1000 for i in range(length)], "max_tokens": max_tokens}
        self.generate([request])
        return {"seconds": self.scheduler.express_stats.compaction_seconds}

    def collectives(self):
        """What each rank said to the others since the last call (gloo_worker.py)."""
        return self.llm.collective_rpc("collectives")


def _allocated():
    """Bytes that torch holds on the device; the peak is counted from here on."""
    import torch

    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def adapter(path):
    """One adapter a folder; vLLM tells them apart by a positive number."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(path, 1 + zlib.crc32(path.encode()) % (1 << 30), path)


def margins(logprobs):
    """Log-probability gap between the best two tokens of every position."""
    if not logprobs:
        return None
    gaps = []
    for entry in logprobs:
        best = sorted((x.logprob for x in entry.values()), reverse=True)
        gaps.append(best[0] - best[1])
    return gaps


def main(job):
    start = time.monotonic()
    engine = Engine(job["engine"])
    print(f"[job] start: {time.monotonic() - start:.1f} s", file=sys.stderr)
    results = []
    for name, arguments in job["calls"]:
        start = time.monotonic()
        results.append(getattr(engine, name)(**arguments))
        print(f"[job] {name}: {time.monotonic() - start:.1f} s", file=sys.stderr)
    with open(job["output"], "w") as file:
        json.dump(results, file)
    sys.stdout.flush()
    os._exit(0)  # engine teardown is not under test and takes seconds


if __name__ == "__main__":
    main(JOB)
