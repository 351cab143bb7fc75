"""What PTX becomes in C++ that works on registers alone: arithmetic, comparisons, moves.

A rule takes the instruction and returns a statement, or None where it does not know the variant.
"""

HALVES = ("f16", "bf16", "f16x2", "bf16x2")
WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


class Rules(dict):
    """By the first word of an opcode."""

    def rule(self, *roots):
        def register(function):
            self.update(dict.fromkeys(roots, function))
            return function

        return register


RULES = Rules()
rule = RULES.rule


# Arithmetic. x, y, z stand for the operands; the functions of 16-bit types are in ptx_rt.h.
FLOAT = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "fma": "std::fma({0}, {1}, {2})",
    "mad": "std::fma({0}, {1}, {2})",
    "neg": "-{0}",
    "abs": "std::fabs({0})",
    "sqrt": "std::sqrt({0})",
    "rsqrt": "1 / std::sqrt({0})",
    "rcp": "1 / {0}",
    "ex2": "std::exp2({0})",
    "lg2": "std::log2({0})",
    "sin": "std::sin({0})",
    "cos": "std::cos({0})",
    "tanh": "std::tanh({0})",
    "copysign": "std::copysign({1}, {0})",
}
WHOLE = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^"}


def half_type(type):
    return "BF16" if type.startswith("bf16") else "F16"


def floating(i, result=None):
    type = i.type
    operands = [i.value(k) for k in range(1, len(i.operands))]
    if type in HALVES:
        function = "halves" if type.endswith("x2") else "half"
        root = i.parts[0] + ("_nan" if i.has("NaN") else "")
        result = f"{function}<{half_type(type)}>(op_{root}, {', '.join(operands)})"
    else:
        result = result or FLOAT[i.parts[0]].format(*operands)
        result = f"({i.ctype()})({result})"
    if i.has("sat"):
        result = f"__saturatef({result})" if type == "f32" else None
    if i.has("ftz") and type == "f32":
        result = f"flushed({result})"
    return result and i.put(0, result)


@rule("fma", "div", "sqrt", "rsqrt", "rcp", "ex2", "lg2", "sin", "cos", "tanh", "copysign")
def float_only(i):
    if i.type[0] in "us":
        return i.put(0, f"quotient({i.values(1, 2)})")
    return floating(i)


@rule("rem")
def remainder(i):
    return i.put(0, f"remainder_of({i.values(1, 2)})")


@rule("add", "sub", "and", "or", "xor", "addc", "subc")
def add(i):
    root, x, y = i.parts[0], i.value(1), i.value(2)
    if i.type == "pred":
        return i.put(0, f"(bool)({x} {WHOLE[root]} {y})")
    if "f" in i.type:
        return floating(i)
    if i.has("cc") or root in ("addc", "subc"):
        into = "true" if i.has("cc") else "false"
        given = "carry" if root in ("addc", "subc") else "false"
        return i.put(0, f"{root[:3]}_carry<{i.ctype()}>({x}, {y}, {given}, {into}, carry)")
    if i.has("sat"):
        return i.put(0, f"clamped<int32_t>((int64_t){x} {WHOLE[root]} {y})")
    return i.put(0, f"({i.ctype()})({x} {WHOLE[root]} {y})")


@rule("mul", "mad", "madc")
def multiply(i):
    if "f" in i.type:
        return floating(i)
    if i.has("cc") or i.parts[0] == "madc":
        return None
    x, y, type = i.value(1), i.value(2), i.type
    if i.has("wide"):
        type = WIDER[type]
        product = f"({i.ctype(type)}){x} * ({i.ctype(type)}){y}"
    elif i.has("hi"):
        product = f"high_product<{i.ctype()}>({x}, {y})"
    else:
        product = f"low_product<{i.ctype()}>({x}, {y})"
    if i.parts[0] == "mad":
        product = f"{product} + {i.value(3, type)}"
    return i.put(0, f"({i.ctype(type)})({product})")


@rule("neg", "abs", "not", "cnot")
def unary(i):
    root, x = i.parts[0], i.value(1)
    if "f" in i.type:
        return floating(i)
    if root == "not":
        return i.put(0, f"!{x}" if i.type == "pred" else f"({i.ctype()})~{x}")
    whole = {"neg": f"0 - {x}", "abs": f"{x} < 0 ? 0 - {x} : {x}", "cnot": f"{x} == 0"}
    return i.put(0, f"({i.ctype()})({whole[root]})")


@rule("min", "max")
def extreme(i):
    root = i.parts[0]
    if i.type in HALVES:
        return floating(i)
    nan = "true" if i.has("NaN") else "false"
    function = f"{root}_of<{nan}, {i.ctype()}>"
    result = f"{function}({i.values(1, 2)})"
    if len(i.operands) > 3:
        result = f"{function}({result}, {i.value(3)})"
    return i.put(0, result) if not i.has("xorsign", "relu") else None


@rule("shl", "shr")
def shift(i):
    return i.put(0, f"{i.parts[0]}<{i.ctype()}>({i.value(1)}, {i.value(2, 'u32')})")


@rule("shf")
def funnel(i):
    kind = ".".join(i.parts[1:3])
    function = {"l.wrap": "l", "r.wrap": "r", "l.clamp": "lc", "r.clamp": "rc"}[kind]
    return i.put(0, f"__funnelshift_{function}({i.values(1, 3)})")


@rule("bfi")
def bit_insert(i):
    return i.put(0, f"bfi<{i.ctype()}>({i.values(1, 2)}, {i.values(3, 4, 'u32')})")


@rule("bfe")
def bit_extract(i):
    return i.put(0, f"bfe<{i.ctype()}>({i.value(1)}, {i.values(2, 3, 'u32')})")


@rule("popc", "clz", "brev", "bfind")
def bits(i):
    function = f"{i.parts[0]}{'_shift' if i.has('shiftamt') else ''}"
    return i.put(0, f"bits_{function}<{i.ctype()}>({i.value(1)})")


@rule("prmt")
def permute(i):
    if len(i.parts) > 2:
        return None
    return i.put(0, f"cuemu_permute({i.values(1, 3, 'b32')})")


@rule("lop3")
def three_way(i):
    if i.has("BOOL"):
        return None
    return i.put(0, f"lop3({i.values(1, 3, 'b32')}, {i.operands[4]})")


@rule("sad")
def absolute_difference(i):
    x, y, z = i.value(1), i.value(2), i.value(3)
    return i.put(0, f"({i.ctype()})({z} + ({x} < {y} ? {y} - {x} : {x} - {y}))")


@rule("dp4a")
def dot_of_bytes(i):
    a, b = (("int8_t" if p == "s32" else "uint8_t") for p in i.parts[1:3])
    return i.put(0, f"dot4<{a}, {b}>({i.values(1, 3, 'u32')})")


# Comparison and choice.


@rule("setp", "set")
def compare(i):
    words = i.parts[1:]
    if i.parts[0] == "set" and i.types[0] not in ("u32", "s32", "f32"):
        return None
    comparison, type = words[0], i.type
    if type.endswith("x2"):
        return None
    x, y = i.value(1), i.value(2)
    if type in HALVES:
        x, y = (f"{half_type(type)}::widen({v})" for v in (x, y))
    result = f"compare_{comparison}({x}, {y})"
    combine = next((w for w in words[1:] if w in ("and", "or", "xor")), None)
    if combine:
        other = i.value(3, "pred")
        sign = {"and": "&&", "or": "||", "xor": "!="}[combine]
        result = f"({result} {sign} {other})"
    if i.parts[0] == "set":
        return i.put(0, f"({result} ? {'1.f' if i.types[0] == 'f32' else '~0u'} : 0)")
    yes, _, no = i.operands[0].partition("|")
    if no and combine:
        return None
    both = f"const bool c_ = {result}; " + i.put(yes, "c_") + (i.put(no, "!c_") if no else "")
    return f"{{ {both} }}"


@rule("selp")
def select(i):
    return i.put(0, f"({i.value(3, 'pred')} ? {i.value(1)} : {i.value(2)})")


@rule("slct")
def select_by_sign(i):
    return i.put(0, f"({i.value(3)} >= 0 ? {i.value(1, i.types[0])} : {i.value(2, i.types[0])})")


@rule("testp")
def test(i):
    function = {"finite": "isfinite", "infinite": "isinf", "notanumber": "isnan"}.get(i.parts[1])
    return i.put(0, f"std::{function}({i.value(1)})") if function else None


# Moves and conversions.


@rule("mov")
def move(i):
    part = {"b64": "b32", "b32": "b16"}.get(i.type)
    if i.operands[0].startswith("{"):
        names = i.vector(0)
        if len(names) != 2:
            return None
        low, high = names
        width = part[1:]
        puts = i.put(low, f"({i.ctype(part)})v_") + i.put(high, f"({i.ctype(part)})(v_ >> {width})")
        return f"{{ const {i.ctype()} v_ = {i.value(1)}; {puts} }}"
    if i.operands[1].startswith("{"):
        names = i.vector(1)
        if len(names) != 2:
            return None
        low, high = (i.value(n, part) for n in names)
        return i.put(0, f"(({i.ctype()}){high} << {part[1:]} | {low})")
    return i.put(0, i.value(1))


ROUND_TO_WHOLE = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}


@rule("cvt")
def convert(i):
    if i.has("relu", "satfinite", "tf32"):
        return None
    if i.types[0] in ("f16x2", "bf16x2"):
        half = half_type(i.types[0])
        high, low = (f"{half}::narrow({i.value(k, 'f32')})" for k in (1, 2))
        return i.put(0, f"((uint32_t){high} << 16 | {low})")
    to, source = i.types
    value = i.value(1, source)
    if source in HALVES:
        value = f"{half_type(source)}::widen({value})"
    whole = next((f for r, f in ROUND_TO_WHOLE.items() if i.has(r)), None)
    floats = "f" in to, "f" in source
    if floats[1] and whole:
        value = f"std::{whole}({value})"
    if any(floats) and i.has("rz", "rm", "rp"):
        return None
    if to in HALVES:
        value = f"{half_type(to)}::narrow({value})"
    elif floats == (False, True) or (not floats[0] and i.has("sat")):
        value = f"clamped<{i.ctype(to)}>({value})"
    elif i.has("sat"):
        value = f"__saturatef({value})"
    else:
        value = f"({i.ctype(to)}){value}"
    return i.put(0, value)


@rule("cvta")
def convert_address(i):
    if not i.has("shared", "shared::cta"):
        return i.put(0, i.value(1, "u64"))
    function = "shared_offset" if i.has("to") else "shared_pointer"
    return i.put(0, f"{function}({i.value(1, 'u64')})")


@rule("isspacep")
def is_space(i):
    inside = f"is_shared({i.value(1, 'u64')})"
    return i.put(0, {"shared": inside, "global": f"!{inside}"}[i.parts[1].partition("::")[0]])
