"""Generate torchvk/runtime/vulkan/_ffi.py and _registry.py from Khronos' registry (vk.xml).

    python tools/generate_binding.py --registry vk.xml

vk.xml comes with https://github.com/KhronosGroup/Vulkan-Headers (folder ``registry``). The runtime's own source
says what is needed: every ``vkFunction``, ``VkType`` and ``VK_CONSTANT`` that it names, and the types these are
made of, are generated and nothing else. So after naming a new one, run this again; a test compares the two.

``_ffi.py`` is a cffi out-of-line ABI module (pure Python, no compiler). Enumerations are plain integers in it;
their values, the structure types and the names of results are in ``_registry.py``.
"""

from __future__ import annotations

import argparse
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path

from cffi import FFI

RUNTIME = Path(__file__).resolve().parent.parent / "torchvk" / "runtime"
BINDING = RUNTIME / "vulkan"
GENERATED = ("_ffi.py", "_registry.py")
NAME = re.compile(r"\b(?:vk[A-Z]\w+|Vk[A-Z]\w+|VK_[A-Z0-9_]+|PFN_vk\w+)\b")
# The one function that is taken from the library itself; the others come through it.
ENTRY = "vkGetInstanceProcAddr"
# Base types that are not in the registry, or are preprocessor code there. Handles are pointers on every 64-bit
# platform, which is all that is supported.
PRELUDE = "typedef uint32_t VkBool32; typedef uint32_t VkFlags; typedef uint64_t VkFlags64;\n"
BUILT_IN = {"void", "char", "float", "double", "int", "size_t", "VkBool32", "VkFlags", "VkFlags64"} | {
    f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)
}


def used_names() -> set[str]:
    """Every Vulkan name in the runtime's hand-written source."""
    files = [path for path in RUNTIME.rglob("*.py") if path.name not in GENERATED]
    return {name for path in files for name in NAME.findall(path.read_text(encoding="utf-8"))}


@dataclass
class Registry:
    """The parts of vk.xml that matter: elements by name, and values of constants."""

    version: str
    types: dict[str, ET.Element]
    commands: dict[str, ET.Element]
    constants: dict[str, int]
    results: dict[int, str]


@dataclass
class Output:
    """C declarations in dependency order."""

    done: set[str] = field(default_factory=set)
    declarations: list[str] = field(default_factory=list)
    structure_types: dict[str, int] = field(default_factory=dict)


def vulkan_only(element: ET.Element) -> bool:
    """False for what only Vulkan SC has."""
    return "vulkan" in element.get("api", "vulkan").split(",")


def integer(text: str) -> int:
    """A constant as vk.xml writes it: 12, 0x7F, (~0U), (~0ULL)."""
    if inverted := re.fullmatch(r"\(~(\d+)(U|ULL)(?:-\d+)?\)", text):
        return ~int(inverted[1]) & (2**64 - 1 if inverted[2] == "ULL" else 2**32 - 1)
    return int(re.sub(r"[UL]+$", "", text), 0)


def enum_value(element: ET.Element, extension: int) -> int | None:
    """The value of an <enum>, or None if it has none that is an integer."""
    if bit := element.get("bitpos"):
        return 1 << int(bit)
    if offset := element.get("offset"):
        number = int(element.get("extnumber", extension))
        value = 1_000_000_000 + (number - 1) * 1000 + int(offset)
        return -value if element.get("dir") == "-" else value
    try:
        return integer(element.get("value", ""))
    except ValueError:
        return None


def read_registry(path: Path) -> Registry:
    """Parse vk.xml."""
    root = ET.parse(path).getroot()
    types: dict[str, ET.Element] = {}
    for element in filter(vulkan_only, root.iter("type")):
        name = element.get("name") or element.findtext("name") or element.findtext("proto/name")
        if name and element.get("category"):
            types[name] = element
    commands: dict[str, ET.Element] = {}
    for element in filter(vulkan_only, root.iter("command")):
        name = element.get("name") if element.get("alias") else element.findtext("proto/name")
        if name:
            commands[name] = element
    constants: dict[str, int] = {}
    results: dict[int, str] = {}
    aliases: dict[str, str] = {}
    groups = [(group, 0) for group in root.findall("enums")]
    groups += [(feature, 0) for feature in root.findall("feature")]
    groups += [(ext, int(ext.get("number", 0))) for ext in root.findall("extensions/extension")]
    for group, number in groups:
        for element in filter(vulkan_only, group.iter("enum")):
            name = element.get("name", "")
            if alias := element.get("alias"):
                aliases[name] = alias
            elif (value := enum_value(element, number)) is not None:
                constants[name] = value
                if "VkResult" in (group.get("name"), element.get("extends")):
                    results[value] = name
    for name, alias in aliases.items():
        if alias in constants:
            constants[name] = constants[alias]
    header = next(text for e in root.iter("type") if "VK_HEADER_VERSION_COMPLETE" in (text := "".join(e.itertext())))
    major_minor = re.findall(r"\d+", header.split("VK_MAKE_API_VERSION")[-1])[1:3]
    patch = next(
        found[1]
        for e in root.iter("type")
        if (found := re.search(r"#define VK_HEADER_VERSION (\d+)", "".join(e.itertext()).replace("\u00a0", " ")))
    )
    return Registry(".".join([*major_minor, patch]), types, commands, constants, results)


def c_text(element: ET.Element, registry: Registry) -> str:
    """The C declaration that a member, parameter or prototype spells, with array sizes as numbers."""
    text = element.text or ""
    for child in element:
        if child.tag != "comment":
            text += "".join(child.itertext())
        text += child.tail or ""
    text = re.sub(r"\[(VK_\w+)\]", lambda match: f"[{registry.constants[match[1]]}]", text)
    return " ".join(text.replace("VKAPI_PTR", "").split())


def resolve(name: str, table: dict[str, ET.Element]) -> ET.Element:
    """The element of that name, through aliases."""
    element = table[name]
    while alias := element.get("alias"):
        element = table[alias]
    return element


def function_type(name: str, element: ET.Element, registry: Registry) -> str:
    """``typedef result (*name)(parameters);`` for a command or a function pointer type."""
    result = c_text(element.find("proto"), registry).rsplit(" ", 1)[0]  # type: ignore[arg-type]
    parameters = [c_text(parameter, registry) for parameter in element.findall("param") if vulkan_only(parameter)]
    return f"typedef {result} (*{name})({', '.join(parameters) or 'void'});"


def require(name: str, registry: Registry, output: Output) -> None:
    """Declare a type and, before it, the types that it is made of."""
    if name in output.done or name in BUILT_IN:
        return
    output.done.add(name)
    element = registry.types[name]
    category = element.get("category")
    if alias := element.get("alias"):
        require(alias, registry, output)
        output.declarations.append(f"typedef {alias} {name};")
    elif category == "handle":
        output.declarations.append(f"typedef struct {name}_T *{name};")
    elif category == "enum":
        wide = element.get("bitvalues") or name.endswith("FlagBits2")
        output.declarations.append(f"typedef {'uint64_t' if wide else 'int32_t'} {name};")
    elif category in ("bitmask", "basetype"):
        output.declarations.append(c_text(element, registry))
    elif category == "funcpointer":
        for child in element.findall(".//type"):
            require(child.text or "", registry, output)
        output.declarations.append(function_type(name, element, registry))
    elif category in ("struct", "union"):
        members = [member for member in element.findall("member") if vulkan_only(member)]
        output.declarations.append(f"typedef {category} {name} {name};")
        for member in members:
            require(member.findtext("type", ""), registry, output)
            if member.get("values", "").startswith("VK_STRUCTURE_TYPE_"):
                output.structure_types[name] = registry.constants[member.get("values", "")]
        body = " ".join(c_text(member, registry) + ";" for member in members)
        output.declarations.append(f"{category} {name} {{ {body} }};")
    else:
        raise SystemExit(f"{name}: do not know how to declare a {category}")


def generate(registry: Registry, names: set[str]) -> tuple[str, str]:
    """The C declarations and the text of ``_registry.py``."""
    output = Output()
    functions = sorted(name for name in names if name.startswith("vk"))
    for name in sorted(name for name in names if name.startswith(("Vk", "PFN_"))):
        if name.startswith("PFN_") and name not in registry.types:
            continue  # made from the command below
        require(name, registry, output)
    for name in functions:
        command = resolve(name, registry.commands)
        for child in command.iter("type"):
            require(child.text or "", registry, output)
        output.declarations.append(function_type(f"PFN_{name}", command, registry))
        if name == ENTRY:
            output.declarations.append(function_type(name, command, registry).replace(f"(*{name})", name)[8:])
    constants = {name: registry.constants[name] for name in sorted(names) if name.startswith("VK_")}
    lines = [
        f'"""Generated by tools/generate_binding.py from Vulkan registry {registry.version}. Do not edit."""',
        "",
        f'VERSION = "{registry.version}"',
        "FUNCTIONS = frozenset(",
        "    {",
        *(f'        "{name}",' for name in functions),
        "    }",
        ")",
        "STRUCTURE_TYPES = {",
        *(f'    "{name}": {value},' for name, value in sorted(output.structure_types.items())),
        "}",
        "RESULTS = {",
        *(f'    {value}: "{name}",' for value, name in sorted(registry.results.items(), reverse=True)),
        "}",
        *(f"{name} = {value}" for name, value in constants.items()),
        "",
    ]
    return PRELUDE + "\n".join(output.declarations), "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", type=Path, required=True, help="Khronos' vk.xml")
    parser.add_argument("--output", type=Path, default=BINDING, help="folder for the two generated files")
    options = parser.parse_args()
    registry = read_registry(options.registry)
    declarations, constants = generate(registry, used_names())
    ffi = FFI()
    ffi.set_source("torchvk.runtime.vulkan._ffi", None)
    ffi.cdef(declarations)
    target = options.output / "_ffi.py"
    ffi.emit_python_code(str(target))
    note = f"# Generated by tools/generate_binding.py from Vulkan registry {registry.version}. Do not edit.\n"
    target.write_text(note + target.read_text())
    (options.output / "_registry.py").write_text(constants)


if __name__ == "__main__":
    main()
