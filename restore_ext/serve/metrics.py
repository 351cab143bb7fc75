"""What /metrics tells Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from restore_ext.hf.report import VisualTokens

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_REDUCTION_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Of one server; any thread may count."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "restore_ext_requests",
            "Chat completions by HTTP status; 499: the client left, 500 also within a stream",
            ["status"],
            registry=registry,
        )
        self.in_flight = Gauge(
            "restore_ext_requests_in_flight",
            "Chat completions that are read, wait or run",
            registry=registry,
        )
        self.request_seconds = Histogram(
            "restore_ext_request_seconds",
            "From a chat completion's arrival to the end of its answer",
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "restore_ext_time_to_first_token_seconds",
            "From a chat completion's arrival to its first token, waiting included",
            buckets=_SECONDS,
            registry=registry,
        )
        self.reduction_seconds = Histogram(
            "restore_ext_reduction_seconds",
            "Scoring, selecting, merging and planning, for prompts that were reduced",
            buckets=_REDUCTION_SECONDS,
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "restore_ext_prompt_tokens",
            "Tokens of prompts before the reduction, as usage.prompt_tokens has them",
            registry=registry,
        )
        self.generated_tokens = Counter(
            "restore_ext_generated_tokens",
            "Tokens of answers",
            registry=registry,
        )
        self.visual_tokens = Counter(
            "restore_ext_visual_tokens",
            "Visual tokens of the prompt, and those left in the first and the last decoder layer",
            ["place"],
            registry=registry,
        )

    def count_visual(self, tokens: VisualTokens) -> None:
        for place, count in vars(tokens).items():
            self.visual_tokens.labels(place).inc(count)
