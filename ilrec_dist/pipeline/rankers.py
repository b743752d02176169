"""Beam search as a run evaluates."""

from __future__ import annotations

from ilrec_dist.config.tree import Config
from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.inference.beam_search import Decoder
from ilrec_dist.inference.inputs import InputForm
from ilrec_dist.inference.parallel_head import SoftmaxScope
from ilrec_dist.inference.ranker import ModelRanker
from ilrec_dist.pipeline.artifacts import RunArtifacts


def evaluation_ranker(
    config: Config,
    artifacts: RunArtifacts,
    backbone: Decoder,
    *,
    softmax_scope: SoftmaxScope,
    inputs: InputForm,
    parallel: ParallelState,
    model_name: str = "the model",
) -> ModelRanker:
    """Ranks with these weights as `config.evaluation`
    has it. Errors name the model as `model_name`.
    """
    return ModelRanker(
        backbone,
        artifacts.trie,
        beam=config.evaluation.beam,
        batch_size=config.evaluation.batch_size,
        softmax_scope=softmax_scope,
        inputs=inputs,
        parallel=parallel,
        model_name=model_name,
    )
