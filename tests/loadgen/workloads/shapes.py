"""Workloads for tests, and what is true of any workload's prefixes."""

import numpy as np
from hypothesis import strategies as st
from prfaas.loadgen.workloads.arrivals import Load, SteadyRate
from prfaas.loadgen.workloads.lengths import Uniform
from prfaas.loadgen.workloads.prefixes import Segment, StreamPrefixes
from prfaas.loadgen.workloads.prompts import TokenPrompts
from prfaas.loadgen.workloads.rngs import Rngs
from prfaas.loadgen.workloads.synthetic import SharedPrefixes, SyntheticShape, Turns, synthetic_workload

VOCAB = 1 << 20


@st.composite
def shapes(draw):
    return SyntheticShape(
        input_lengths=Uniform(1, draw(st.integers(1, 40))),
        output_lengths=Uniform(1, draw(st.integers(1, 20))),
        prefixes=SharedPrefixes(draw(st.integers(0, 3)), draw(st.integers(0, 50)), draw(st.sampled_from([0.0, 1.5]))),
        turns=Turns(draw(st.floats(1, 5)), draw(st.sampled_from([0.0, 2.0])), 1.0, 0.5),
        max_context_tokens=draw(st.sampled_from([120, 1 << 20])),
        block_tokens=draw(st.sampled_from([1, 4, 16])),
    )


def workload_of(shape, requests=20, seed=1, load=None):
    return synthetic_workload("test", shape, load or Load(SteadyRate(5.0)), Rngs.from_seed(seed), requests=requests)


def tokens_of(workload, index):
    return TokenPrompts(workload.content_seed, VOCAB).token_ids(workload.prefixes.segments(index)).tolist()


def chain_of(tokens, block_tokens):
    """Block ids by definition: of each block, everything up to its end."""
    return [tuple(tokens[:end]) for end in range(block_tokens, len(tokens) + block_tokens, block_tokens)]


def assert_ids_are_prefixes(workload):
    """Over all prompts: equal block ids exactly where they are equal up to the block's end; the blocks that outputs
    fill have ids of their own or those of a longer prompt."""
    block_tokens = workload.prefixes.block_tokens
    prefix_of_id, id_of_prefix = {}, {}
    for index in range(len(workload)):
        tokens = tokens_of(workload, index)
        chains = [(workload.prefixes.block_ids(index).tolist(), chain_of(tokens, block_tokens))]
        assert len(chains[0][0]) == len(chains[0][1])
        if isinstance(workload.prefixes, StreamPrefixes):
            own = workload.prefixes.segments(index)[-1]
            output = Segment(own.stream, own.tokens, int(workload.output_tokens[index]))
            tokens = tokens + TokenPrompts(workload.content_seed, VOCAB).token_ids([output]).tolist()
            held = workload.prefixes.sequence_block_ids(index).tolist()
            chains.append((held, chain_of(tokens, block_tokens)[: len(held)]))
        for ids, chain in chains:
            for block, prefix in zip(ids, chain, strict=True):
                assert prefix_of_id.setdefault(block, prefix) == prefix
                assert id_of_prefix.setdefault(prefix, block) == block


def columns_of(workload):
    names = ("arrival_s", "prompt_tokens", "output_tokens", "conversation", "turn", "think_s")
    return {name: np.nan_to_num(getattr(workload, name), nan=-1.0).tolist() for name in names}
