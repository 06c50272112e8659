"""What the machine code of the tensor cores' kernels must have and must not: gate.py's rules.

ptxas says when it spills, and when it serialises wgmma (C75xx); the rest is seen in the code
only. On Hopper the loop with the products has to issue the next ones in time: nothing in it may
wait for the block or for memory.
"""

import re
import subprocess
from typing import NamedTuple

LOCAL_MEMORY = ("LDL", "STL")

# ---- mma.sync ---------------------------------------------------------------------------

MMA = {  # regular expressions
    r"HMMA\.": "tensor cores",
    r"LDSM\.": "ldmatrix",
    r"LDGSTS\..*\b128\b": "16-byte cp.async",
}

# ---- wgmma ------------------------------------------------------------------------------

WGMMA = {
    r"HGMMA\.64x256x16\.F32": "tensor cores, the whole tile at once",
    r"UTMALDG\.": "TMA loads",
    r"UTMASTG\.": "TMA stores",
    r"STSM\.16\.M": "stmatrix",
    r"USETMAXREG\.": "registers that move",
}
NOT_IN_THE_LOOP = ("R2UR", "WARPSYNC", "MEMBAR", "SHFL", "BAR")
MOST_BETWEEN = 12  # instructions between two products of a stage
MOST_AT_THE_BORDER = 42  # from the last of a stage to the first of the next: waits, barriers


class Instruction(NamedTuple):
    code: str
    text: str


def parse(body):
    """The instructions of a kernel's section, and where its labels stand."""
    instructions, labels = [], {}
    for line in body.splitlines():
        if m := re.match(r"^(\.L_\w+):", line.strip()):
            labels[m[1]] = len(instructions)
        elif m := re.match(r"^\s*/\*[0-9a-f]{4,}\*/\s+((?:@!?U?P\w+\s+)?([A-Z][\w.]*).*?);", line):
            instructions.append(Instruction(m[2], m[1]))
    return instructions, labels


def lacks(instructions, wanted):
    for pattern, what in wanted.items():
        if not any(re.match(pattern, i.code) for i in instructions):
            yield f"has no {pattern} ({what})"


def has(instructions, unwanted, where=""):
    for code in sorted({i.code for i in instructions if i.code.startswith(unwanted)}):
        yield f"has {code}{where}"


def calls(instructions):
    for target in sorted({m[1] for i in instructions if (m := re.search(r"`\((\$\w+)", i.text))}):
        yield f"calls {target}"


def mma_rules(file, instructions, labels):
    tf32 = file.endswith("_tf32")  # ldmatrix transposes 16-bit elements only; IEEE division calls
    yield from lacks(instructions, {p: w for p, w in MMA.items() if not (tf32 and w == "ldmatrix")})
    yield from has(instructions, LOCAL_MEMORY)
    if not tf32:
        yield from calls(instructions)


def wgmma_rules(file, instructions, labels):
    yield from lacks(instructions, WGMMA)
    yield from has(instructions, LOCAL_MEMORY)
    yield from calls(instructions)
    texts = [i.text for i in instructions]
    granted = [
        int(m[1], 16) for t in texts if (m := re.search(r"TRY_ALLOC\S* U?P\w+, (0x[0-9a-f]+)", t))
    ]  # fmt: skip
    used = max((int(r) for t in texts for r in re.findall(r"\bR(\d+)\b", t)), default=0)
    if granted and used >= max(granted):
        yield f"names register {used}, and has {max(granted)}"

    loop = product_loop(instructions, labels)
    products = [i for i, instruction in enumerate(loop) if instruction.code.startswith("HGMMA")]
    if not products:
        yield "has no loop of products"
        return
    yield from has(loop, NOT_IN_THE_LOOP, " in the loop of products")
    between = [b - a - 1 for a, b in zip(products, products[1:])]
    border = len(loop) - 1 - products[-1] + products[0]
    if max(between, default=0) > MOST_BETWEEN or border > MOST_AT_THE_BORDER:
        yield f"has {between} instructions between products and {border} from stage to stage"


def product_loop(instructions, labels):
    """The instructions of the loop that has the most products for its length."""

    def density(loop):
        return sum(i.code.startswith("HGMMA") for i in loop) / len(loop)

    loops = []
    for last, instruction in enumerate(instructions):
        target = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction.text)
        first = labels.get(target[1], last + 1) if target else last + 1
        if first <= last:
            loops.append(instructions[first : last + 1])
    return max(loops, key=density, default=[])


# ---- which rules are whose ------------------------------------------------------------

RULES = {  # file and architecture, both whole: the rules
    r"grouped_gemm_sm80_(bf16|f16|tf32) .*": mma_rules,
    r"router_product_sm80 .*": mma_rules,
    r"grouped_gemm_sm90_(bf16|f16) sm_90a": wgmma_rules,
}


def sections(nvdisasm, cubin):
    """{mangled name of a kernel: its section, as nvdisasm prints it}"""
    done = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True)
    split = re.split(r"^\s*\.section\s+\.text\.([\w.$]+),.*$", done.stdout, flags=re.M)
    return dict(zip(split[1::2], split[2::2]))


def check_machine_code(cubins, nvdisasm, demangle):
    """Complaints about the tensor cores' kernels. cubins: {(file, architecture): path}."""
    if nvdisasm is None:
        return ["no nvdisasm (pip install nvidia-cuda-nvdisasm): the machine code is not checked"]
    complaints, checked = [], dict.fromkeys(RULES, 0)
    for (file, arch), cubin in cubins.items():
        for whose, rules in RULES.items():
            if not re.fullmatch(whose, f"{file} {arch}"):
                continue
            bodies = sections(nvdisasm, cubin)
            names = demangle(list(bodies))
            for mangled, body in bodies.items():
                checked[whose] += 1
                found = rules(file, *parse(body))
                complaints += [f"{file}.cu for {arch}: {names[mangled]} {what}" for what in found]
    print(f"machine code of {sum(checked.values())} tensor-core kernels looked through")
    return complaints + [f"no kernel of {whose} was found" for whose, n in checked.items() if not n]
