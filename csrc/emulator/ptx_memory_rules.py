"""What PTX becomes in C++ that reaches beyond a thread's registers: memory, branches, barriers,
warps."""

from ptx_rules import HALVES, Rules, half_type

RULES = Rules()
rule = RULES.rule

# Memory.


def space(i):
    spaces = ("global", "shared", "param", "local", "const")
    return next((p for p in i.parts if p.startswith(spaces)), "generic")


def ordering(i):
    """How the checker sees an access: 1 atomic, 2 also a release before it, 4 an acquire after."""
    flags = int(i.has("relaxed", "acquire", "release", "acq_rel") or i.parts[0] in ("atom", "red"))
    wide = i.has("gpu", "sys")
    flags += 2 * (wide and i.has("release", "acq_rel"))
    return flags + 4 * (wide and i.has("acquire", "acq_rel"))


@rule("ld", "ldu")
def load(i):
    where, names, c = space(i), i.vector(0), i.ctype()
    if where == "param":
        source = f"(const {c}*){i.address(1, where)}"
    else:
        source = f"load<{c}, {len(names)}, {ordering(i)}>({i.address(1, where)})"
    puts = " ".join(i.put(name, f"q_[{k}]") for k, name in enumerate(names) if name != "_")
    return f"{{ const {c}* q_ = {source}; {puts} }}"


@rule("st")
def store(i):
    names, c = i.vector(1), i.ctype()
    target = f"store<{c}, {len(names)}, {ordering(i)}>({i.address(0, space(i))})"
    puts = " ".join(f"q_[{k}] = {i.value(name)};" for k, name in enumerate(names))
    return f"{{ {c}* q_ = {target}; {puts} }}"


ATOMIC = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")


@rule("atom", "red")
def atomic(i):
    function = next((p for p in i.parts if p in ATOMIC), None)
    first = 1 if i.parts[0] == "atom" else 0
    if function is None or i.operands[first + 1].startswith("{"):
        return None
    half = f", {half_type(i.type)}" if i.type in HALVES else ""
    arguments = i.values(first + 1, len(i.operands) - 1)
    call = (
        f"atomic_{function}<{i.ctype()}, {ordering(i)}{half}>"
        f"({i.address(first, space(i))}, {arguments})"
    )
    return i.put(0, call) if first else f"{call};"


@rule("membar", "fence")
def fence(i):
    if i.opcode.startswith("fence.proxy.async"):
        return "restore_ext::cuda::fence_proxy_async();"
    return "__threadfence();" if i.has("gl", "gpu", "sys") else ";"


@rule("prefetch", "prefetchu", "discard", "applypriority", "griddepcontrol", "createpolicy")
def hint(i):
    return ";"


# Control.


@rule("bra")
def branch(i):
    return f"goto {i.operands[0].replace('$', '_')};"


@rule("brx")
def branch_by_index(i):
    targets = enumerate(i.kernel.targets[i.operands[1]])
    cases = " ".join(f"case {k}: goto {t.replace('$', '_')};" for k, t in targets)
    return f"switch ({i.value(0, 'u32')}) {{ {cases} }}"


@rule("ret", "exit")
def leave(i):
    return "return;"


@rule("trap")
def trap(i):
    return 'cuemu::fail("trap");'


@rule("nanosleep")
def sleep(i):
    return f"__nanosleep({i.value(0)});"


@rule("bar", "barrier")
def barrier(i):
    if i.has("cluster"):
        return None
    if i.has("warp"):
        return f"__syncwarp({i.value(0, 'b32')});"
    if i.has("red"):
        function = next(f for f in ("popc", "and", "or") if i.has(f))
        if i.operands[1] != "0" or len(i.operands) > 3:
            return None
        word = {"popc": "count"}.get(function, function)
        return i.put(0, f"__syncthreads_{word}({i.value(len(i.operands) - 1, 'pred')})")
    threads = i.value(1, "u32") if len(i.operands) > 1 else "0"
    wait = "false" if i.has("arrive") else "true"
    what = f'"{i.parts[0]}", __builtin_FILE(), __builtin_LINE()'
    return f"cuemu::bar_sync({i.value(0, 'u32')}, {threads}, {wait}, {what});"


# Warps.


@rule("shfl")
def shuffle(i):
    to, _, inside = i.operands[0].partition("|")
    ok = "ok_" if inside else "nullptr"
    call = f"shuffle<'{i.parts[2][0]}'>({i.values(1, 4, 'b32')}, {'&ok_' if inside else ok})"
    put = i.put(to, call)
    return f"{{ bool ok_; {put} {i.put(inside, 'ok_')} }}" if inside else put


@rule("vote")
def vote(i):
    kind = i.parts[2]
    if kind not in ("ballot", "any", "all", "uni"):
        return None
    return i.put(0, f"__{kind}_sync({i.value(2, 'b32')}, {i.value(1, 'pred')})")


@rule("match")
def match(i):
    to, _, all_same = i.operands[0].partition("|")
    value, mask = i.value(1), i.value(2, "b32")
    if i.has("any"):
        return i.put(0, f"__match_any_sync({mask}, {value})")
    same = i.put(all_same, "same_") if all_same else ""
    return f"{{ int same_; {i.put(to, f'__match_all_sync({mask}, {value}, &same_)')} {same} }}"


@rule("redux")
def reduce(i):
    if i.type == "f32":
        return None
    type = "u32" if i.type == "b32" else i.type
    return i.put(0, f"__reduce_{i.parts[2]}_sync({i.value(2, 'b32')}, {i.value(1, type)})")


@rule("elect")
def elect(i):
    to, _, chosen = i.operands[0].partition("|")
    mask = i.value(1, "b32")
    first = f"__ffs({mask}) - 1"
    puts = f"{i.put(to, first)} {i.put(chosen, f'(cuemu::self->lane == {first})')}"
    return f"{{ __syncwarp({mask}); {puts} }}"
