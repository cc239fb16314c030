"""A long decode on the GPU gives the tokens of the CPU path, up to the first tie."""

import json

import pytest
from cpu_tokens import COUNT, FILE, SERVER, job
from engines import run_engine

pytestmark = pytest.mark.gpu
#: Two backends' float32 log-probabilities differ by rounding; below this gap a token is tied.
TIE = 2e-3
#: The most that half of the gaps between the best two tokens may differ.
GAP = 1e-2


def test_the_gpu_decodes_the_tokens_of_the_cpu(tmp_path):
    expected = json.loads(FILE.read_text())
    calls = [("generate", {"requests": [job(expected["prompt"])]})]
    (result,) = run_engine(tmp_path, "express", calls, additional_config=SERVER)
    ours = result["tokens"][0]
    assert len(ours) == len(expected["tokens"]) == COUNT
    pairs = enumerate(zip(ours, expected["tokens"], strict=True))
    first = next((i for i, (a, b) in pairs if a != b), COUNT)
    print(f"the first {first} of {COUNT} tokens agree")
    if first < COUNT:
        assert expected["margins"][first] < TIE
    assert first > 100, "compactions have long begun"
    # The text soon repeats itself, which hides small errors: the gaps must agree, too.  Rounding
    # may flip a tie of two slots, after which some gaps differ by more.
    gaps = zip(result["margins"][0][:first], expected["margins"][:first], strict=True)
    apart = sorted(abs(a - b) for a, b in gaps)
    quantiles = {q: apart[int(q * (len(apart) - 1))] for q in (0.5, 0.9, 0.99, 1.0)}
    print(f"differences of the gaps, by quantile: {quantiles}")
    assert quantiles[0.5] < GAP
