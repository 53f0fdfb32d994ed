"""The pickle machine: plain data comes out as pickle.loads has it, names become records, nothing is run."""

import pickle
import pickletools
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cogtools.checkpoint import limits
from cogtools.checkpoint.pickle.machine import Global, MalformedPickleError, Record, Vocabulary, read_pickle
from cogtools.checkpoint.pickle.plain_calls import PLAIN_ONLY

PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)

KEYS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**80), 2**80), st.floats(allow_nan=False), st.text(), st.binary()
)
HASHABLE = st.recursive(KEYS, lambda inside: st.tuples(inside, inside), max_leaves=5)
PLAIN = st.recursive(
    HASHABLE | st.sets(HASHABLE, max_size=4) | st.frozensets(HASHABLE, max_size=4),
    lambda inside: st.lists(inside) | st.dictionaries(HASHABLE, inside) | st.tuples(inside) | st.tuples(inside, inside),
    max_leaves=20,
)


def shown(value: object) -> str:
    """Equal values of equal types, which == does not tell: True and 1, 0.0 and -0.0, the order of a dict."""
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__} {sorted(map(shown, value))}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} {list(map(shown, value))}"
    if isinstance(value, dict):
        return f"dict {[(shown(key), shown(item)) for key, item in value.items()]}"
    return repr(value)


@pytest.mark.slow
@settings(max_examples=200, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(value=PLAIN)
def test_plain_data_is_read_as_pickle_reads_it_in_every_protocol(value: object) -> None:
    for protocol in PROTOCOLS:
        data = pickle.dumps(value, protocol)
        read = read_pickle(data + b"behind", PLAIN_ONLY)

        assert (shown(read.value), read.foreign, read.end) == (shown(pickle.loads(data)), {}, len(data))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (OrderedDict([("b", 1), ("a", 2)]), {"b": 1, "a": 2}),
        (defaultdict(list, {"a": [1]}), {"a": [1]}),
        ({1, 2}, {1, 2}),
        (frozenset({1, 2}), frozenset({1, 2})),
        (b"", b""),
        (bytes(range(256)), bytes(range(256))),
        ("\0\n\r\\u\ud800\U0001f600", "\0\n\r\\u\ud800\U0001f600"),
        ([2**31, -(2**31), 2**63, -1, 255, 65536], [2**31, -(2**31), 2**63, -1, 255, 65536]),
    ],
    ids=["OrderedDict", "defaultdict", "set", "frozenset", "empty-bytes", "bytes", "text", "integers"],
)
def test_containers_of_the_standard_library_become_plain_ones(protocol: int, value: object, plain: object) -> None:
    read = read_pickle(pickle.dumps(value, protocol), Vocabulary(PLAIN_ONLY.calls, {Global("__builtin__", "list")}))

    assert shown(read.value) == shown(plain)


@pytest.mark.parametrize(
    ("data", "value"),
    [
        pytest.param(
            b"\x80\x02ccollections\nOrderedDict\n](](U\x01bK\1e](U\x01aK\2ee\x85R.",
            {"b": 1, "a": 2},
            id="OrderedDict-of-pairs",
        ),
        pytest.param(b"\x80\x02U\x02ab.", "ab", id="str"),
        pytest.param(b"\x80\x02T\x02\0\0\0\xff\xfe.", b"\xff\xfe", id="str-that-is-no-text"),
        pytest.param(b"\x80\x02(K\1(K\x021K\3t.", (1, 3), id="POP_MARK"),
        pytest.param(b"\x80\x02(K\x012t.", (1, 1), id="DUP"),
    ],
)
def test_what_other_writers_wrote_is_read(data: bytes, value: object) -> None:
    assert shown(read_pickle(data, PLAIN_ONLY).value) == shown(value)


@pytest.mark.parametrize("protocol", [0, 1])
def test_protocols_that_pytorch_does_not_write_are_refused(protocol: int) -> None:
    with pytest.raises(MalformedPickleError) as caught:
        read_pickle(pickle.dumps({"a": 2**40, "b": 1.5}, protocol), PLAIN_ONLY)
    assert str(caught.value) == OLD


@pytest.mark.parametrize(
    "opcode",
    ["INT", "LONG", "FLOAT", "STRING", "UNICODE", "LIST", "DICT", "PUT", "GET", "INST", "PERSID"],
)
def test_instructions_of_protocols_0_and_1_only_are_refused(opcode: str) -> None:
    with pytest.raises(MalformedPickleError) as caught:
        read_pickle(b"(" + getattr(pickle, opcode) + b"1\n1\n.", PLAIN_ONLY)
    assert str(caught.value) == OLD


def test_every_instruction_that_a_pickler_writes_in_protocols_2_to_5_is_known() -> None:
    text = {
        opcode.name
        for opcode in pickletools.opcodes
        if opcode.arg is not None and opcode.arg.n == pickletools.UP_TO_NEWLINE and opcode.name != "GLOBAL"
    }
    out_of_band = {"NEXT_BUFFER", "READONLY_BUFFER"}
    unknown = set()
    for opcode in pickletools.opcodes:
        try:
            read_pickle(opcode.code.encode("latin-1") + b"\0" * 16, PLAIN_ONLY)
        except MalformedPickleError as error:
            if str(error) in (OLD, f"it has an unknown instruction, 0x{ord(opcode.code):02x}"):
                unknown.add(opcode.name)
    assert unknown == text | out_of_band | {"LIST", "DICT"}


def test_a_container_that_holds_itself_is_read() -> None:
    cycle: list[object] = [1]
    cycle.append(cycle)
    value = read_pickle(pickle.dumps(cycle), PLAIN_ONLY).value

    assert isinstance(value, list)
    assert value[0] == 1
    assert value[1] is value


def test_what_is_mentioned_twice_is_one_object() -> None:
    shared = [1]
    value = read_pickle(pickle.dumps([shared, shared]), PLAIN_ONLY).value

    assert isinstance(value, list)
    assert value[0] is value[1]


OLD = "it is written in pickle protocol 0 or 1; PyTorch writes protocol 2 and newer"


class Foreign:
    """A class that no table knows; its instances have a state."""

    def __init__(self) -> None:
        self.name = "x"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_an_instance_of_an_unknown_class_becomes_a_record_and_its_names_are_counted(protocol: int) -> None:
    read = read_pickle(pickle.dumps([Foreign(), Foreign(), Foreign], protocol), PLAIN_ONLY)
    name = Global("tests.checkpoint.test_unpickler", "Foreign")

    assert isinstance(read.value, list)
    for record in read.value[:2]:
        assert isinstance(record, Record)
        assert (record.function, record.arguments, record.state, record.items) == (name, (), {"name": "x"}, [])
    assert read.value[2] == name
    # pickle mentions a name once; what comes again it takes from the memo.
    assert read.foreign == {name: 1}


def test_every_mention_of_a_name_is_counted() -> None:
    read = read_pickle(b"(cos\nsystem\ncos\nsystem\n\x82\x05t.", PLAIN_ONLY)

    assert read.foreign == {
        Global("os", "system"): 2,
        Global("copyreg extension", "5"): 1,
    }


def test_a_call_of_an_unknown_name_becomes_a_record_with_its_arguments_and_items() -> None:
    counter: Counter[str] = Counter("aab")
    value = read_pickle(pickle.dumps(counter), PLAIN_ONLY).value

    assert isinstance(value, Record)
    assert (value.function, value.arguments) == (Global("collections", "Counter"), ({"a": 2, "b": 1},))


def test_an_array_of_numpy_becomes_a_record() -> None:
    array = np.arange(3, dtype=np.uint32)
    read = read_pickle(pickle.dumps(array, 2), PLAIN_ONLY)

    assert isinstance(read.value, Record)
    assert str(read.value.function).endswith("multiarray._reconstruct")
    assert isinstance(read.value.state, tuple)
    assert (read.value.state[1], read.value.state[4]) == ((3,), array.tobytes())
    assert {name.name for name in read.foreign} == {"_reconstruct", "ndarray", "dtype"}


def test_a_state_given_to_a_plain_container_is_left_out() -> None:
    state_dict: OrderedDict[str, int] = OrderedDict(a=1)
    state_dict._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]

    assert read_pickle(pickle.dumps(state_dict, 2), PLAIN_ONLY).value == {"a": 1}


def long(number: int) -> bytes:
    """The instruction that pushes a large number."""
    encoded = pickle.encode_long(number)
    return pickle.LONG1 + bytes([len(encoded)]) + encoded


EMPTY = "it ends too early, or uses what is not there"


@pytest.mark.parametrize(
    ("data", "found"),
    [
        pytest.param(b"", EMPTY, id="nothing"),
        pytest.param(b".", "it ends with nothing on the stack", id="only-STOP"),
        pytest.param(b"\x80\x06N.", "it is written in pickle protocol 6; the newest known one is 5", id="protocol-6"),
        pytest.param(b"N", EMPTY, id="no-STOP"),
        pytest.param(b"\xff.", "it has an unknown instruction, 0xff", id="unknown-instruction"),
        pytest.param(b"NQ.", "it refers to an object outside of it where there can be none", id="persistent-id"),
        pytest.param(b"h\0.", "an instruction uses a memo entry that was never stored", id="memo"),
        pytest.param(b"t.", "an instruction looks for a mark that is not there", id="mark"),
        pytest.param(b"N\x86.", "an instruction finds too little on the stack", id="tuple"),
        pytest.param(b"R.", EMPTY, id="call-of-nothing"),
        pytest.param(b"NNa.", "it has an instruction to append items where there is a NoneType", id="append"),
        pytest.param(b"N(N\x90.", "it has an instruction to add items where there is a NoneType", id="add"),
        pytest.param(b"NNNs.", "it has an instruction to set items where there is a NoneType", id="set"),
        pytest.param(b"}(Nu.", "it sets a key without a value", id="odd-items"),
        pytest.param(b"}]Ns.", "it uses a list as a key", id="list-as-key"),
        pytest.param(b"}]\x85Ns.", "it uses a tuple as a key", id="list-in-a-key"),
        pytest.param(b"NN\x93.", "it has a name that is not a string", id="name"),
        pytest.param(b"ccollections\nOrderedDict\nNR.", "it calls collections.OrderedDict with a NoneType", id="call"),
        pytest.param(b"X\1\0\0\0\xff.", "it has a string that is not UTF-8", id="utf-8"),
        pytest.param(b"T\xff\xff\xff\xff.", "it has a string of -1 bytes", id="negative-length"),
        pytest.param(b"\x8e" + b"\xff" * 8 + b".", "it ends too early", id="length-beyond-the-end"),
        pytest.param(b"\x8b\xff\xff\xff\xff.", "it has an integer of -1 bytes", id="negative-integer-length"),
        pytest.param(b"\x8b\x01\x04\0\0" + bytes(1025) + b".", "it has an integer of 1,025 bytes", id="long-integer"),
        pytest.param(b"}(" + b"N" * 1000 + b"tNs.", "it uses a tuple as a key", id="large-tuple-as-key"),
        pytest.param(b"}N" + b"2\x86" * 30 + b"Ns.", "it uses a tuple as a key", id="tuple-that-doubles-as-key"),
        pytest.param(
            b"}(" + b"".join(long(index * (2**61 - 1)) + b"N" for index in range(1, 30_002)) + b"u.",
            "it has more keys of tuples and large numbers than any checkpoint",
            id="keys-of-one-hash",
        ),
        pytest.param(
            b"}(" + b"".join(b"(M%stN" % index.to_bytes(2, "little") for index in range(15_001)) + b"u.",
            "it has more keys of tuples and large numbers than any checkpoint",
            id="many-tuples-as-keys",
        ),
        pytest.param(b"(" + b"\x8f" * 125_001 + b"t.", "it copies more than 1,000,000 items", id="many-sets"),
    ],
)
def test_a_broken_pickle_is_refused_with_what_is_wrong(data: bytes, found: str) -> None:
    with pytest.raises(MalformedPickleError) as caught:
        read_pickle(data, PLAIN_ONLY)
    assert str(caught.value) == found


def test_a_tuple_of_a_thousand_parts_can_be_a_key() -> None:
    key = tuple(range(998))

    assert read_pickle(pickle.dumps({key: 1}), PLAIN_ONLY).value == {key: 1}


def test_a_program_is_ended_after_so_many_instructions() -> None:
    assert read_pickle(b"N0" * 499 + b"N.", PLAIN_ONLY, instructions=1000).value is None
    with pytest.raises(MalformedPickleError, match=r"^it has more than 1,000 instructions$"):
        read_pickle(b"N0" * 499 + b"N0N.", PLAIN_ONLY, instructions=1000)
    with pytest.raises(MalformedPickleError, match=r"^it has more than 1,000,000 instructions$"):
        read_pickle(b"N0" * 500_000 + b"N.", PLAIN_ONLY)


def test_names_are_told_as_far_as_a_person_could_read_them() -> None:
    of = [b"cp\nn%d\n0" % index for index in range(limits.MAX_NAMES + 1)]

    assert len(read_pickle(b"".join(of[1:]) + b"N.", PLAIN_ONLY).foreign) == limits.MAX_NAMES
    with pytest.raises(MalformedPickleError, match=r"^it mentions more than 10,000 different names$"):
        read_pickle(b"".join(of) + b"N.", PLAIN_ONLY)


def test_copies_are_counted_over_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_COPIED_ITEMS", 1000)
    hundred_items = b"](" + b"K\1" * 100 + b"eq\x00"
    call = b"0c__builtin__\nset\nh\x00\x85R"

    assert read_pickle(hundred_items + call * 10 + b".", PLAIN_ONLY).value == {1}
    with pytest.raises(MalformedPickleError, match=r"^it copies more than 1,000 items$"):
        read_pickle(hundred_items + call * 11 + b".", PLAIN_ONLY)
