"""What the instructions around the tensor cores become: calls of the twins in cuemu_ptx.h and
cuemu_hopper.h, which also stand in for the wrappers of csrc/cuda/ptx.cuh and hopper.cuh."""

import re

from ptx_rules import Rules

RULES = Rules()
rule = RULES.rule
NAMESPACE = "restore_ext::cuda::"
MMA_TYPE = {"bf16": "__nv_bfloat16", "f16": "__half"}


def puts(i, names, source):
    return " ".join(i.put(name, f"{source}[{k}]") for k, name in enumerate(names))


@rule("ldmatrix")
def load_matrix(i):
    names = i.vector(0)
    if not i.has("m8n8") or len(names) != 4:
        return None
    function = "ldmatrix_x4_trans" if i.has("trans") else "ldmatrix_x4"
    call = f"{NAMESPACE}{function}(m_, {i.address(1, 'shared')});"
    return f"{{ uint32_t m_[4]; {call} {puts(i, names, 'm_')} }}"


@rule("mma")
def multiply_fragments(i):
    if not i.has("m16n8k16") or i.types[0] != "f32" or i.types[1] not in MMA_TYPE:
        return None
    a, b, c = (i.vector(k) for k in (1, 2, 3))
    floats = ", ".join(i.value(n, "f32") for n in c)
    left = ", ".join(i.value(n, "b32") for n in a)
    right = ", ".join(i.value(n, "b32") for n in b)
    call = f"{NAMESPACE}mma_m16n8k16<{MMA_TYPE[i.types[1]]}>(d_, a_, {right});"
    before = f"float d_[4] = {{{floats}}}; uint32_t a_[4] = {{{left}}};"
    return f"{{ {before} {call} {puts(i, i.vector(0), 'd_')} }}"


@rule("cp")
def copy(i):
    if i.opcode == "cp.async.commit_group":
        return "cuemu::cp_commit();"
    if i.opcode == "cp.async.wait_group":
        return f"cuemu::cp_wait({i.operands[0]});"
    if i.opcode == "cp.async.wait_all":
        return "cuemu::cp_wait(-1);"
    if i.has("bulk"):
        return bulk_copy(i)
    if i.has("mbarrier"):
        return None
    size = i.operands[2]
    valid = i.value(3, "u32") if len(i.operands) > 3 else size
    source = i.address(1, "global")
    return f"cuemu::cp_async({i.address(0, 'shared')}, {source}, {size}, {valid});"


def bulk_copy(i):
    found = re.match(
        r"cp\.async\.bulk\.tensor\.[2-4]d\.shared::cluster\.global\.mbarrier::complete_tx::bytes$",
        i.opcode,
    )
    if not found:
        return None
    map, coordinates = i.operands[1].strip()[1:-1].split(",", 1)
    places = ", ".join(i.value(c.strip(), "s32") for c in coordinates.strip()[1:-1].split(","))
    bar = f"(uint64_t*){i.address(2, 'shared')}"
    map = f"(const CUtensorMap*){i.value(map.strip(), 'u64')}"
    return f"{NAMESPACE}tma_load({i.address(0, 'shared')}, {map}, {bar}, {places});"


@rule("mbarrier")
def barrier_object(i):
    def bar(operand):
        return f"(uint64_t*){i.address(operand, 'shared')}"

    if i.parts[1] == "init":
        return f"{NAMESPACE}mbar_init({bar(0)}, {i.value(1, 'u32')});"
    if i.has("expect_tx") and i.parts[1] == "arrive":
        return f"{NAMESPACE}mbar_expect_tx({bar(1)}, {i.value(2, 'u32')});"
    if i.parts[1] == "arrive" and i.operands[0] == "_" and len(i.operands) == 2:
        return f"{NAMESPACE}mbar_arrive({bar(1)});"
    if i.parts[1] == "try_wait" and i.has("parity"):
        return i.put(0, f"{NAMESPACE}mbar_try({bar(1)}, {i.value(2, 'u32')})")
    return ";" if i.parts[1] == "inval" else None


@rule("wgmma")
def multiply_by_warpgroup(i):
    # Done at once here; the C++ twin does it at the wait, which is the stricter test.
    if i.parts[1] in ("fence", "commit_group", "wait_group"):
        return ";"
    shape = re.match(r"m64n(\d+)k16$", i.parts[4])
    if not shape or i.parts[5] != "f32" or i.parts[6] != i.parts[7] or i.parts[6] not in MMA_TYPE:
        return None
    names, n = i.vector(0), int(shape[1])
    in_registers = i.operands[1].startswith("{")
    scales, transposed = i.operands[4:6], i.operands[6:]
    if scales != ["1", "1"] or len(transposed) != 2 - in_registers or len(names) != n // 2:
        return None
    floats = ", ".join(i.value(name, "f32") for name in names)
    registers = ", ".join(i.value(name, "b32") for name in i.vector(1)) if in_registers else ""
    left = "a_, 0" if in_registers else f"nullptr, {i.value(1, 'u64')}"
    half = str(i.parts[6] == "f16").lower()
    a_trans = "0" if in_registers else transposed[0]
    product = (
        f"{{d_, {left}, {i.value(2, 'u64')}, {n}, {half}, {i.value(3, 'pred')}, "
        f"{a_trans} == 1, {transposed[-1]} == 1}}"
    )
    place = "__builtin_FILE(), __builtin_LINE()"
    call = f"{NAMESPACE}wgmma_fence(); {NAMESPACE}emu::wgmma({product}, {place});"
    wait = f"{NAMESPACE}wgmma_commit(); {NAMESPACE}wgmma_wait<0>();"
    before = f"float d_[{n // 2}] = {{{floats}}}; uint32_t a_[] = {{{registers or 0}}};"
    return f"{{ {before} (void)a_; {call} {wait} {puts(i, names, 'd_')} }}"


@rule("setmaxnreg")
def registers_change_hands(_):
    return ";"
