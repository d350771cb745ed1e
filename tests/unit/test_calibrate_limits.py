"""The memory that is left: read from /proc and control groups as they stand on machines and in containers."""

import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from cor_vllm.calibrate.model import limits
from cor_vllm.calibrate.model.limits import Limit, host_limit, pages_limit

GB = 10**9
NONE_V1 = 9223372036854771712  # what v1 has for "no limit"
V2 = "30 23 0:26 {top} {point} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "36 31 0:33 {top} {point} rw,relatime - cgroup cgroup rw,memory\n"
    "35 31 0:32 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
)
Machine = Callable[..., Path]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine's /proc and control groups as a folder: 50 GB are free, the process has no limits."""
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def write(
        group: str, mounts: str, groups: dict[str, dict[str, object]], free: int = 50 * GB, size: int = 0
    ) -> Path:
        proc = tmp_path / "proc"
        (proc / "self").mkdir(parents=True)
        (proc / "meminfo").write_text(
            f"MemTotal: 64000000 kB\nMemFree: 1000 kB\nMemAvailable: {free // 1024} kB\n"
        )
        (proc / "self/cgroup").write_text(group)
        (proc / "self/mountinfo").write_text("22 1 254:1 / / rw - ext4 /dev/vda1 rw\n" + mounts)
        (proc / "self/status").write_text(f"Name:\tpython\nVmSize:\t{size} kB\nVmData:\t{size // 2} kB\n")
        for folder, files in groups.items():
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            for name, value in files.items():
                (tmp_path / folder / name).write_text(f"{value}\n")
        return tmp_path

    return write


def v2(limit: object, used: int, cached: int = 0, **more: object) -> dict[str, object]:
    stat = f"anon {used - cached}\nfile {cached}\ninactive_file {cached}\nactive_file 0"
    return {"memory.max": limit, "memory.current": used, "memory.stat": stat} | {
        name.replace("_", "."): value for name, value in more.items()
    }


def v1(limit: int, used: int, cached: int = 0) -> dict[str, object]:
    stat = f"inactive_file 1\nactive_file 1\ntotal_inactive_file {cached - 1}\ntotal_active_file 1"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}


def test_a_machine_without_limits(machine: Machine) -> None:
    mounts = V2.format(top="/", point="/sys/fs/cgroup")
    root = machine("0::/user.slice\n", mounts, {"sys/fs/cgroup/user.slice": v2("max", 5 * GB)})
    found = host_limit(root=root)
    assert found.free == 50 * GB // 1024 * 1024 and found.name == "on this machine"


def test_no_proc_at_all(tmp_path: Path) -> None:
    assert pages_limit(tmp_path).free == pages_limit(tmp_path).total > 0


@pytest.mark.parametrize("limited", ["a.slice", "a.slice/b.scope", "a.slice/b.scope/c"])
def test_nested_groups_each_have_their_limit(machine: Machine, limited: str) -> None:
    """The tightest of the group and all its ancestors; cached files are given back when needed."""
    folders = ("a.slice", "a.slice/b.scope", "a.slice/b.scope/c")
    groups = {f"sys/fs/cgroup/{f}": v2(8 * GB if f == limited else "max", 5 * GB, 2 * GB) for f in folders}
    groups["sys/fs/cgroup/other"] = v2(1, 1)
    root = machine("0::/a.slice/b.scope/c\n", V2.format(top="/", point="/sys/fs/cgroup"), groups)
    assert host_limit(root=root) == Limit(5 * GB, 8 * GB, "under the limit of its control group")


def test_a_group_that_is_full_leaves_nothing(machine: Machine) -> None:
    groups = {"sys/fs/cgroup/a": v2(2 * GB, 3 * GB)}
    root = machine("0::/a\n", V2.format(top="/", point="/sys/fs/cgroup"), groups)
    assert host_limit(root=root).free == 0


def test_what_a_group_is_slowed_down_at_is_a_limit(machine: Machine) -> None:
    groups = {"sys/fs/cgroup/a": v2(9 * GB, 1 * GB, memory_high=3 * GB)}
    root = machine("0::/a\n", V2.format(top="/", point="/sys/fs/cgroup"), groups)
    assert host_limit(root=root).free == 2 * GB


@pytest.mark.parametrize(
    ("top", "own"),
    [("/", "/"), ("/docker/f00", "/docker/f00"), ("/docker/f00", "/"), ("/", "/../../pod")],
    ids=["own namespace", "the host's", "mounted from the host", "another's namespace"],
)
def test_containers_find_their_limit_at_the_mount(machine: Machine, top: str, own: str) -> None:
    mounts = V2.format(top=top, point="/sys/fs/cgroup")
    root = machine(f"0::{own}\n", mounts, {"sys/fs/cgroup": v2(4 * GB, 1 * GB)})
    assert host_limit(root=root).free == 3 * GB


def test_a_group_below_what_is_mounted(machine: Machine) -> None:
    mounts = V2.format(top="/docker", point="/sys/fs/cgroup")
    groups = {"sys/fs/cgroup": v2("max", 1 * GB), "sys/fs/cgroup/f00": v2(4 * GB, 1 * GB)}
    assert host_limit(root=machine("0::/docker/f00\n", mounts, groups)).free == 3 * GB


@pytest.mark.parametrize("limited", ["", "docker", "docker/f00"])
def test_version_1(machine: Machine, limited: str) -> None:
    """Its memory controller has a mount of its own, beside those of others and of version 2."""
    mounts = V1.format(top="/", point="/sys/fs/cgroup/memory") + V2.format(
        top="/", point="/sys/fs/cgroup/unified"
    )
    groups = {
        f"sys/fs/cgroup/memory/{f}": v1(6 * GB if f == limited else NONE_V1, 3 * GB, GB)
        for f in ("", "docker", "docker/f00")
    }
    root = machine(
        "5:cpu,cpuacct:/elsewhere\n4:memory:/docker/f00\n1:name=systemd:/x\n0::/\n", mounts, groups
    )
    assert host_limit(root=root) == Limit(4 * GB, 6 * GB, "under the limit of its control group")


def test_a_mount_with_a_space_in_its_name(machine: Machine) -> None:
    mounts = V2.format(top="/", point="/my\\040groups")
    root = machine("0::/a\n", mounts, {"my groups/a": v2(4 * GB, 1 * GB)})
    assert host_limit(root=root).free == 3 * GB


@pytest.mark.parametrize(("kind", "taken"), [("RLIMIT_AS", 2), ("RLIMIT_DATA", 1)])
def test_limits_of_the_process(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, kind: str, taken: int
) -> None:
    """Address space is taken by mapped files, by threads and by everything set aside so far."""
    root = machine("", "", {}, size=2 * 10**6)
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(
        resource,
        "getrlimit",
        lambda asked: (9 * GB, 9 * GB) if asked == getattr(resource, kind) else infinite,
    )
    left = 9 * GB - taken * 1024 * 10**6 - 3 * limits.THREAD_BYTES
    assert host_limit(root=root).free == left and "(ulimit -" in host_limit(root=root).name
    assert host_limit(GB, root).free == left - (GB if kind == "RLIMIT_AS" else 0)
    assert pages_limit(root).name == "on this machine", "what is allocated already passed these"


def test_this_process() -> None:
    """Whatever machine this is: some memory is free, and not more than there is."""
    found = host_limit()
    assert 0 < found.free <= found.total
