"""Facts about the build; importing the module registers the operators."""

compiler: str
torch_target: str
cpu: str
cuda_archs: str
