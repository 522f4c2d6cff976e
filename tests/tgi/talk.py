"""What the router says to a shard, said by a script that runs in the server's own environment.

Reads a JSON list of conversations from standard input and writes one JSON answer: for each request its tokens, its
text and why it stopped. A conversation is a list of steps, a step is ``requests`` that come together; later steps join
what is being generated, after ``after`` more tokens. Usage: ``talk.py SOCKET_PREFIX SHARDS``.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from text_generation_server.pb import generate_pb2 as pb
from text_generation_server.pb import generate_pb2_grpc

MAX_TOTAL, MAX_INPUT = 512, 384


class Shards:
    """All shards, told the same at the same time; the first one's answers count, and each one's share of tokens."""

    def __init__(self, prefix: str, count: int):
        self.stubs = [
            generate_pb2_grpc.TextGenerationServiceStub(grpc.insecure_channel(f"unix://{prefix}-{rank}"))
            for rank in range(count)
        ]
        self.pool = ThreadPoolExecutor(count)
        self.next_block = 1
        self.info: Any = None

    def call(self, method: str, request: Any) -> list[Any]:
        """The answers of all shards."""
        sent = [self.pool.submit(getattr(stub, method), request, timeout=240) for stub in self.stubs]
        return [future.result() for future in sent]

    def start(self) -> None:
        """Everything up to warm-up."""
        self.call("ServiceDiscovery", pb.ServiceDiscoveryRequest())
        self.call("ClearCache", pb.ClearCacheRequest())
        self.info = self.call("Info", pb.InfoRequest())[0]
        batch = self.batch(0, [{"id": 0, "prompt": "_test " * MAX_INPUT, "max_new_tokens": 4}])
        request = pb.WarmupRequest(
            batch=batch, max_input_tokens=MAX_INPUT, max_prefill_tokens=MAX_INPUT, max_total_tokens=MAX_TOTAL
        )
        self.call("Warmup", request)
        self.call("Health", pb.HealthRequest())
        self.next_block = 1

    def batch(self, batch_id: int, requests: list[dict[str, Any]]) -> Any:
        """A batch of requests, with blocks of the cache where the server wants them assigned."""
        made = [self._request(request) for request in requests]
        return pb.Batch(
            id=batch_id,
            requests=made,
            size=len(made),
            max_tokens=len(made) * MAX_TOTAL,
            max_blocks=max(len(request.blocks) for request in made),
        )

    def _request(self, asked: dict[str, Any]) -> Any:
        parameters = {"temperature": 1.0, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0}
        request = pb.Request(
            id=asked["id"],
            inputs=asked["prompt"],
            input_chunks=pb.Input(chunks=[pb.InputChunk(text=asked["prompt"])]),
            truncate=MAX_INPUT,
            add_special_tokens=True,
            parameters=pb.NextTokenChooserParameters(**{**parameters, **asked.get("parameters", {})}),
            stopping_parameters=pb.StoppingCriteriaParameters(
                max_new_tokens=asked["max_new_tokens"], ignore_eos_token=asked.get("ignore_eos", False)
            ),
        )
        if not self.info.requires_padding:
            size = self.info.block_size
            blocks = -(-MAX_TOTAL // size)
            request.blocks.extend(range(self.next_block, self.next_block + blocks))
            request.slots.extend(slot for block in request.blocks for slot in range(block * size, (block + 1) * size))
            self.next_block += blocks
        return request


def talk(shards: Shards, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Run the steps; tokens and endings by request id."""
    tokens: dict[int, list[int]] = {}
    endings: dict[int, dict[str, Any]] = {}

    def note(answers: list[Any]) -> Any:
        for answer in answers:  # each request is reported by one shard
            for generation in answer.generations:
                tokens.setdefault(generation.request_id, []).extend(generation.tokens.ids)
                if generation.HasField("generated_text"):
                    text = generation.generated_text
                    endings[generation.request_id] = {"text": text.text, "reason": text.finish_reason}
        return answers[0].batch if answers[0].HasField("batch") else None

    def decode(running: list[Any]) -> list[Any]:
        batch = note(shards.call("Decode", pb.DecodeRequest(batches=running)))
        if batch is None:
            return []
        alive = [request for request in batch.request_ids if request not in endings]
        if len(alive) < len(batch.request_ids):
            if not alive:
                shards.call("ClearCache", pb.ClearCacheRequest(id=batch.id))
                return []
            kept = shards.call("FilterBatch", pb.FilterBatchRequest(batch_id=batch.id, request_ids=alive))
            return [kept[0].batch]
        return [batch]

    running: list[Any] = []
    for number, step in enumerate(steps, 1):
        for _ in range(step.get("after", 0)):
            running = decode(running)
        batch = note(shards.call("Prefill", pb.PrefillRequest(batch=shards.batch(number, step["requests"]))))
        if batch is not None:
            running.append(batch)
    while running:
        running = decode(running)
    return {str(request): {"tokens": tokens[request], **endings[request]} for request in sorted(tokens)}


if __name__ == "__main__":
    shards = Shards(sys.argv[1], int(sys.argv[2]))
    shards.start()
    answers = [talk(shards, steps) for steps in json.load(sys.stdin)]
    json.dump({"conversations": answers, "requires_padding": shards.info.requires_padding}, sys.stdout)
