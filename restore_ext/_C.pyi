"""Facts about the build, and a profiler's ranges; importing the module registers the operators."""

compiler: str
torch_target: str
cpu_levels: str
cuda_archs: str
nvtx: int

def range_push(name: str) -> None: ...
def range_pop() -> None: ...
