"""Small random-weight models of every architecture in transformers, and what an explanation of each gives.

``python -m benchmarks.families`` explains them one by one; ``--only mamba t5`` some of them. ``dynlrp coverage
'family/*' --verify`` reports on the same models; here are models with heads, other kernels and float64 too.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto

from dynlrp import DynLRPError, UnknownOperationError, explain
from dynlrp.zoo.families import build, copied, model_types
from dynlrp.zoo.target import weighted_sum

HEADS_OF = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING,
    modeling_auto.MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING,
    modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    modeling_auto.MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING,
    modeling_auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING,
    modeling_auto.MODEL_FOR_DEPTH_ESTIMATION_MAPPING,
    modeling_auto.MODEL_FOR_IMAGE_TO_IMAGE_MAPPING,
    modeling_auto.MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING,
    modeling_auto.MODEL_FOR_KEYPOINT_DETECTION_MAPPING,
    modeling_auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING,
    modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING,
    modeling_auto.MODEL_FOR_CTC_MAPPING,
    modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    modeling_auto.MODEL_FOR_AUDIO_XVECTOR_MAPPING,
    modeling_auto.MODEL_FOR_TEXT_TO_SPECTROGRAM_MAPPING,
    modeling_auto.MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING,
    modeling_auto.MODEL_FOR_BACKBONE_MAPPING,
)
"""Where models with heads are listed."""


def heads() -> Iterator[tuple[str, str]]:
    """Every model type that has a head, with the name of the class."""
    for mapping in HEADS_OF:
        for config, name in mapping._model_mapping.items():
            for kind in name if isinstance(name, tuple | list) else [name]:
                yield config, kind


def examine(
    name: str,
    attention: str = "default",
    composite: str = "attnlrp",
    dtype: torch.dtype = torch.float32,
    head: str = "",
) -> dict[str, Any]:
    """What an explanation of this type gives."""
    record: dict[str, Any] = {"name": head or name, "attention": attention, "composite": composite}
    try:
        family, inputs, random, *_ = build(name, attention, head)
    except Exception as error:
        return {**record, "status": "not built", "error": f"{type(error).__name__}: {error}"[:3000]}
    if dtype is torch.float64:
        family.double()
        inputs = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    record["inputs"] = {k: list(v.shape) for k, v in inputs.items()}
    try:
        before = family(**copied(inputs)).detach()
        torch.manual_seed(0)
        start = time.perf_counter()
        before = family(**copied(inputs)).detach()
        record["forward"] = time.perf_counter() - start
        record["output"] = list(before.shape)
        torch.manual_seed(0)
        start = time.perf_counter()
        explanation = explain(family, inputs, weighted_sum, composite=composite, allow_training=random)
        record["seconds"] = time.perf_counter() - start
        record["same"] = bool(torch.equal(explanation.value, weighted_sum(before).detach()))
        ledger = explanation.ledger
        record["error_of_ledger"] = ledger.error
        record["unresolved"] = sorted({n for n, _ in ledger.unresolved})
        record["accounts"] = {"output": ledger.output, **ledger.accounts}
        record["finite"] = all(bool(torch.isfinite(t).all()) for t in explanation.tensors())
        record["status"] = "closes" if ledger.error < 1e-4 else "open"
    except UnknownOperationError as error:
        record["status"] = "unknown operation"
        record["error"] = sorted({n for n, _ in error.operations})
        record["places"] = [f"{n} in {p}" for n, p in error.operations][:6]
        record["reasons"] = error.reasons
    except DynLRPError as error:
        record["status"] = type(error).__name__
        record["error"] = str(error)[:1500]
    except Exception as error:
        record["status"] = "crash"
        last = "".join(traceback.format_tb(error.__traceback__)[-4:])
        record["error"] = f"{type(error).__name__}: {error}"[:600] + "\n" + last
    return record


def _late(signum: int, frame: Any) -> None:
    raise TimeoutError("more than the time limit")


def main() -> None:
    """Examine every type, writing one line of JSON each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--out", default="out/families.jsonl")
    parser.add_argument("--attention", default="default")
    parser.add_argument("--composite", default="attnlrp")
    parser.add_argument("--double", action="store_true")
    parser.add_argument("--heads", action="store_true", help="models with heads")
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("-v", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _late)
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    names = options.only or model_types()
    tasks = [(name, "") for name in names] if not options.heads else sorted(set(heads()))
    for name, head in tasks:
        signal.alarm(options.limit)
        try:
            dtype = torch.float64 if options.double else torch.float32
            record = examine(name, options.attention, options.composite, dtype, head)
        except TimeoutError:
            record = {"name": head or name, "attention": options.attention, "status": "timeout"}
        finally:
            signal.alarm(0)
        with open(options.out, "a") as file:
            file.write(json.dumps(record, default=str) + "\n")
        short = {k: v for k, v in record.items() if k in ("status", "error_of_ledger", "unresolved", "same")}
        print(head or name, short, flush=True)
        if options.v or len(tasks) <= 3:
            print(json.dumps(record, indent=1, default=str)[:4000].replace("\\n", "\n"), flush=True)


if __name__ == "__main__":
    sys.exit(main())
