"""Translates nvcc's PTX, inline asm included, to C++ that runs on the emulator's fibers.

python csrc/emulator/ptx2cpp.py KERNELS.ptx [--skip REGEX] > KERNELS.cpp

A kernel becomes a function of its parameter block; a register becomes a local variable, a branch
a goto, a predicate an if. What an instruction becomes is a rule in ptx_rules.py,
ptx_memory_rules.py or ptx_tensor_rules.py; what the C++ calls is in include/ptx_rt.h. An opcode
without a rule stops the translation with its name.
"""

import argparse
import re

import ptx_memory_rules
import ptx_rules
import ptx_tensor_rules

C_TYPE = {
    **{f"u{n}": f"uint{n}_t" for n in (8, 16, 32, 64)},
    **{f"s{n}": f"int{n}_t" for n in (8, 16, 32, 64)},
    **{f"b{n}": f"uint{n}_t" for n in (8, 16, 32, 64)},
    **{"f16": "uint16_t", "bf16": "uint16_t", "f16x2": "uint32_t", "bf16x2": "uint32_t"},
    **{"f32": "float", "f64": "double", "pred": "bool"},
}
SPECIAL = {
    "%laneid": "cuemu::self->lane",
    "%warpid": "cuemu::self->warp",
    "%lanemask_eq": "(1u << cuemu::self->lane)",
    "%lanemask_lt": "((1u << cuemu::self->lane) - 1)",
    "%lanemask_le": "((2u << cuemu::self->lane) - 1)",
    "%lanemask_ge": "(~0u << cuemu::self->lane)",
    "%lanemask_gt": "(~1u << cuemu::self->lane)",
    "%dynamic_smem_size": "cuemu::dyn_smem_size()",
    "%clock": "clock64()",
    "%clock64": "clock64()",
    "%globaltimer": "clock64()",
    "%smid": "0",
    "WARP_SZ": "32",
}
VECTOR_SPECIAL = {
    "%tid": "threadIdx",
    "%ntid": "blockDim",
    "%ctaid": "blockIdx",
    "%nctaid": "gridDim",
}
SHARED = r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?;"
LOCATION = r"\.loc\s+(\d+)\s+(\d+)(?:.*inlined_at\s+(\d+)\s+(\d+))?"
RULES = ptx_rules.RULES | ptx_memory_rules.RULES | ptx_tensor_rules.RULES


def split(text):
    """The operands of an instruction: split at the commas outside brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def statements(body):
    """Labels, braces, and what ends with a semicolon."""
    blank, label = re.compile(r"[\s;]*"), re.compile(r"[$\w]+:(?!:)")
    at = blank.match(body).end()
    while at < len(body):
        if body[at] in "{}":
            end = at + 1
        elif found := label.match(body, at):
            end = found.end()
        else:
            end = body.index(";", at) + 1
        yield body[at:end]
        at = blank.match(body, end).end()


def identifier(text):
    return re.sub(r"\W", "_", text)


def bytes_of(type):
    return int(re.sub(r"\D", "", type)) // 8


def as_gcc_mangles(name):
    """nvcc names an unnamed namespace after the file; g++ calls every one _GLOBAL__N_1."""
    found = re.search(r"(\d{2,3})_GLOBAL__N__", name)
    if not found:
        return name
    end = found.end(1) + int(found[1])
    return f"{name[: found.start(1)]}12_GLOBAL__N_1{name[end:]}"


class Instruction:
    """One instruction, with the words that rules are written in."""

    def __init__(self, kernel, opcode, operands):
        self.kernel, self.opcode, self.operands = kernel, opcode, operands
        self.parts = opcode.split(".")
        self.types = [p for p in self.parts if p in C_TYPE]
        self.type = self.types[-1] if self.types else "b32"

    def has(self, *words):
        return any(w in self.parts for w in words)

    def ctype(self, type=None):
        return C_TYPE[type or self.type]

    def value(self, operand, type=None):
        """The C++ expression of an operand, by its index or its text."""
        text = self.operands[operand] if isinstance(operand, int) else operand
        return self.kernel.value(text, type or self.type)

    def values(self, first, last, type=None):
        return ", ".join(self.value(i, type) for i in range(first, last + 1))

    def put(self, operand, expression):
        """Writes a register; "_" is written nowhere."""
        text = self.operands[operand] if isinstance(operand, int) else operand
        if text == "_":
            return f"({expression});"
        return f"put({self.kernel.register(text)}, {expression});"

    def vector(self, operand):
        text = self.operands[operand]
        return split(text[1:-1]) if text.startswith("{") else [text]

    def address(self, operand, space):
        text = self.operands[operand] if isinstance(operand, int) else operand
        return self.kernel.address(text, space)


class Kernel:
    def __init__(self, name, parameters, directives, body, module):
        self.name = name
        self.scopes = [{}]
        self.declarations, self.code, self.line = [], [], ""
        self.scope_count = 0
        self.targets = {}  # of brx.idx
        self.constants = module.constants
        self.place_parameters(parameters)
        body = self.place_shared(body, module.shared)
        body = self.place_local(body)
        limit = re.search(r"\.maxntid\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", directives)
        self.threads = 1024
        if limit:
            x, y, z = (int(n or 1) for n in limit.groups())
            self.threads = x * y * z
        self.files = module.files
        body = re.sub(r"\.(file|pragma|section)\s[^\n;]*[;\n]", "\n", body)
        for statement in statements(re.sub(r"(\.loc\s[^\n]*)\n", r"\1;\n", body)):
            self.translate(statement)

    def place_parameters(self, text):
        self.parameters, end = {}, 0
        for parameter in split(text):
            _, words, name, count = re.match(
                r"(\.param)\s+(.*?)\s*([\w$]+)(?:\[(\d+)\])?$", parameter, re.S
            ).groups()
            type = next(w for w in re.findall(r"\.(\w+)", words) if w in C_TYPE)
            size = bytes_of(type)
            align = re.match(r"\.align\s+(\d+)", words)  # one behind the type is the pointee's
            align = int(align[1]) if align else size
            offset = -(-end // align) * align
            self.parameters[name] = offset
            end = offset + size * int(count or 1)
        self.parameter_bytes = end

    def place_shared(self, body, shared):
        """The kernel's static objects from address 0, then the dynamic ones."""
        used = {n: facts for n, facts in shared.items() if re.search(rf"\b{re.escape(n)}\b", body)}
        self.shared, end = {}, 0
        for name, (align, size) in sorted(used.items(), key=lambda item: not item[1][1]):
            align = align if size else 1024
            self.shared[name] = -(-end // align) * align
            end = self.shared[name] + size
        self.shared_bytes = end
        return re.sub(SHARED, "", body)

    def place_local(self, body):
        declaration = r"\.local\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\];"
        self.local = {}
        for align, name, size in re.findall(declaration, body):
            self.local[name] = f"local_{identifier(name)}"
            self.declarations.append(f"alignas({align}) unsigned char {self.local[name]}[{size}];")
        return re.sub(declaration, "", body)

    def translate(self, statement):
        if statement == "{":
            self.scopes.append({})
            self.code.append("{")
        elif statement == "}":
            self.scopes.pop()
            self.code.append("}")
        elif found := re.match(r"\.reg\s+\.(\w+)\s+(.*);$", statement, re.S):
            self.declare(C_TYPE[found[1]], split(found[2]))
        elif found := re.match(LOCATION, statement):
            if found[4] and "/csrc/" not in self.files[found[1]]:  # the kernel's line, not CUDA's
                found = re.match(LOCATION, f".loc {found[3]} {found[4]}")
            self.line = f"#line {found[2]} {self.files[found[1]]}\n"
        elif found := re.match(r"\.branchtargets\s+(.*);$", statement, re.S):
            self.targets[self.label] = split(found[1])
        elif re.match(r"[$\w]+:$", statement):
            self.label = statement[:-1]
            self.code.append(f"{identifier(self.label)}:;")
        else:
            self.code.append(self.line + self.instruction(statement))

    def declare(self, type, names):
        for name in names:
            if found := re.match(r"(%?[\w$]+)<(\d+)>$", name):
                names = [f"{identifier(found[1])}{i}" for i in range(int(found[2]))]
                for i in range(0, len(names), 8):
                    self.declarations.append(f"{type} {', '.join(names[i : i + 8])};")
                continue
            own = f"s{self.scope_count}_{identifier(name)}"
            self.scope_count += 1
            self.scopes[-1][name] = own
            self.declarations.append(f"{type} {own};")

    def instruction(self, statement):
        found = re.match(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*);$", statement, re.S)
        if not found:
            raise SystemExit(f"{self.name}: cannot parse {statement!r}")
        negated, predicate, opcode, operands = found.groups()
        instruction = Instruction(self, opcode, split(operands.replace("\n", " ")))
        rule = RULES.get(instruction.parts[0])
        code = rule(instruction) if rule else None
        if code is None:
            raise SystemExit(f"{self.name}: no rule for {statement!r}")
        return f"if ({negated}{self.register(predicate)}) {{ {code} }}" if predicate else code

    def register(self, text):
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        return identifier(text)

    def is_register(self, text):
        return text.startswith("%") or any(text in scope for scope in self.scopes)

    def value(self, text, type):
        c = C_TYPE[type]
        special, _, axis = text.partition(".")
        if special in VECTOR_SPECIAL:
            return f"({c}){VECTOR_SPECIAL[special]}.{axis}"
        if text in SPECIAL:
            return f"({c}){SPECIAL[text]}"
        if text.startswith("!"):
            return f"!{self.value(text[1:], type)}"
        if self.is_register(text):
            return f"as<{c}>({self.register(text)})"
        if found := re.match(r"0[fF]([0-9a-fA-F]{8})$", text):
            return f"as<{c}>(float_of(0x{found[1]}u))"
        if found := re.match(r"0[dD]([0-9a-fA-F]{16})$", text):
            return f"as<{c}>(double_of(0x{found[1]}ull))"
        if text in self.parameters:
            return f"({c})(P + {self.parameters[text]})"
        if text in self.shared:
            return f"({c}){self.shared[text]}u"
        if text in self.local or text in self.constants:
            return f"({c})({self.local.get(text) or self.constants[text]})"
        if re.match(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$", text):
            return f"({c})({text.rstrip('U')}{'ull' if 'x' in text else 'll'})"
        if found := re.match(r"([\w$%]+)\s*\+\s*(\d+)$", text):
            return f"({c})({self.value(found[1], type)} + {found[2]})"
        raise SystemExit(f"{self.name}: cannot read the operand {text!r}")

    def address(self, text, space):
        found = re.match(r"\[\s*([%\w$]+)\s*(?:([+-])\s*(-?\w+))?\s*\]$", text)
        if not found:
            raise SystemExit(f"{self.name}: cannot read the address {text!r}")
        base = found[1]
        offset = f" {found[2]} ({found[3]})" if found[2] else ""
        if space == "param" and base in self.parameters:
            return f"(P + {self.parameters[base]}{offset})"
        if space.startswith("shared"):
            return f"shared_at({self.value(base, 'u32')}{offset})"
        return f"global_at({self.value(base, 'u64')}{offset})"

    def text(self):
        name = as_gcc_mangles(self.name)
        facts = f"{self.parameter_bytes}, {self.shared_bytes}, {self.threads}"
        return "\n".join(
            [
                f"static void k_{name}(const unsigned char* P) {{",
                "(void)P; [[maybe_unused]] bool carry = false;",
                *self.declarations,
                *self.code,
                "}",
                f'static const Registered r_{name}("{name}", k_{name}, {facts});',
            ]
        )


class Module:
    def __init__(self, text):
        self.text = re.sub(r"//[^\n]*", "", text)
        self.shared = {}  # name: alignment and bytes, 0 for dynamic memory
        for align, type, name, count in re.findall(SHARED, self.text):
            size = bytes_of(type)
            count = int(count or 0) if f"{name}[" in self.text else 1
            self.shared[name] = (int(align or size), size * count)
        self.files = dict(re.findall(r'\.file\s+(\d+)\s+("[^"]*")', self.text))
        self.constants, self.tables = {}, []
        for align, type, name, size, data in re.findall(
            r"\.(?:global|const)\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?"
            r"(?:\s*=\s*\{?([^;{}]*)\}?)?;",
            self.text,
        ):
            own = f"table_{identifier(name)}"
            self.constants[name] = own
            self.tables.append(
                f"alignas({align}) static {C_TYPE[type]} {own}[{size or 1}] = {{{data}}};"
            )

    def kernels(self, skip=None):
        for found in re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", self.text, re.S):
            if skip and re.search(skip, found[1]):
                continue
            depth, end = 1, found.end()
            while depth:
                depth += (self.text[end] == "{") - (self.text[end] == "}")
                end += 1
            yield Kernel(found[1], found[2], found[3], self.text[found.end() : end - 1], self)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--skip", help="kernels left out: what is found in their mangled names")
    arguments = parser.parse_args()
    print('#include <cuda.h>\n#include "ptx_rt.h"\n#include "cuemu_hopper.h"')
    print("using namespace cuemu::ptx;")
    for path in arguments.files:
        with open(path) as file:
            module = Module(file.read())
        kernels = list(module.kernels(arguments.skip))
        print("namespace {", *module.tables, *(k.text() for k in kernels), "}", sep="\n")


if __name__ == "__main__":
    main()
