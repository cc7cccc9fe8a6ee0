"""Who may use the server: nothing that lets anybody in is on disk, and whoever is removed is out at once."""

from __future__ import annotations

import errno
import json
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from mshub import users as module
from mshub.errors import AccessError
from mshub.logins import HOURS, MOST_PER_USER, Logins
from mshub.throttle import FORGET_S, FREE, LONGEST_S, MOST_KEYS, Throttle
from mshub.users import LONGEST, ROLES, User, UserFile

PASSWORD = "correct horse battery"


@pytest.fixture(autouse=True)
def cheap_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing takes a fifth of a second, on purpose."""
    salt = module.bcrypt.gensalt
    monkeypatch.setattr(module.bcrypt, "gensalt", lambda: salt(4))


@pytest.fixture
def file(tmp_path: Path) -> UserFile:
    users = UserFile(tmp_path / "home" / "users.json")
    users.add("ada", PASSWORD, "admin")
    users.add("grace.h@clinic", "another long one", "annotator")
    return users


def test_without_users_there_is_no_file(tmp_path: Path) -> None:
    users = UserFile(tmp_path / "users.json")
    assert not users
    assert users.users() == []
    assert users.with_password("ada", PASSWORD) is None
    assert users.with_token("mshub_x") is None
    assert list(tmp_path.iterdir()) == []


def test_a_user_is_let_in_by_the_right_password_only(file: UserFile) -> None:
    found = file.with_password("ada", PASSWORD)
    assert found is not None
    assert (found.name, found.role) == ("ada", "admin")
    wrong = ["", "correct horse", PASSWORD.upper(), PASSWORD + " ", "\0", PASSWORD + "\0", "\ud800", "x" * 1000]
    assert [file.with_password("ada", password) for password in wrong] == [None] * len(wrong)
    assert file.with_password("grace.h@clinic", PASSWORD) is None
    assert file.with_password("eve", PASSWORD) is None


def test_the_file_is_its_owners_and_holds_no_password_and_no_token(file: UserFile, tmp_path: Path) -> None:
    token = file.create_token("ada", "nightly export", 30)
    path = tmp_path / "home" / "users.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_text()
    assert PASSWORD not in text
    assert token not in text
    assert token.removeprefix("mshub_") not in text
    assert [entry.name for entry in path.parent.iterdir() if entry.suffix == ".part"] == []


@pytest.mark.parametrize("role", ROLES)
def test_a_role_may_what_those_before_it_may(tmp_path: Path, role: str) -> None:
    users = UserFile(tmp_path / "users.json")
    users.add("first", PASSWORD, "admin")
    users.add("other", PASSWORD, role)
    user = users.user("other")
    assert user is not None
    assert [user.may(needed) for needed in ROLES] == [ROLES.index(needed) <= ROLES.index(role) for needed in ROLES]


@pytest.mark.parametrize("name", ["", ".hidden", "a b", "a/b", "a\n", "ä", "x" * 65, "<b>", "a:b"])
def test_names_that_could_be_more_than_a_name_are_refused(file: UserFile, name: str) -> None:
    with pytest.raises(AccessError, match="refused"):
        file.add(name, PASSWORD, "viewer")


@pytest.mark.parametrize("password", ["", "short", "x" * (LONGEST + 1), "ä" * 37, "long enough\0"])
def test_passwords_nobody_could_keep_are_refused(file: UserFile, password: str) -> None:
    with pytest.raises(AccessError, match="expected at least"):
        file.add("new", password, "viewer")
    with pytest.raises(AccessError, match="expected at least"):
        file.set_password("ada", password)
    assert file.with_password("ada", PASSWORD) is not None


def test_the_first_user_is_admin_and_the_last_admin_stays(tmp_path: Path) -> None:
    users = UserFile(tmp_path / "users.json")
    with pytest.raises(AccessError, match="first user"):
        users.add("eve", PASSWORD, "viewer")
    users.add("ada", PASSWORD, "admin")
    with pytest.raises(AccessError, match="last admin"):
        users.set_role("ada", "viewer")
    users.add("eve", PASSWORD, "viewer")
    with pytest.raises(AccessError, match="last admin"):
        users.remove("ada")
    users.set_role("eve", "admin")
    users.remove("ada")
    users.remove("eve")
    assert not users


def test_what_is_unknown_is_said_and_changes_nothing(file: UserFile) -> None:
    before = [(user.name, user.role, user.since) for user in file.users()]
    for change in (
        lambda: file.add("ada", PASSWORD, "viewer"),
        lambda: file.add("new", PASSWORD, "root"),
        lambda: file.remove("eve"),
        lambda: file.set_password("eve", PASSWORD),
        lambda: file.set_role("ada", "root"),
        lambda: file.create_token("eve", "", 1),
        lambda: file.create_token("ada", "", 0),
        lambda: file.create_token("grace.h@clinic", "", 1, "admin"),
        lambda: file.revoke_token("12345678"),
    ):
        with pytest.raises(AccessError):
            change()
    assert [(user.name, user.role, user.since) for user in file.users()] == before


def test_a_token_is_its_user_until_it_expires_is_revoked_or_the_user_goes(file: UserFile) -> None:
    token, small = file.create_token("ada", "export", 30), file.create_token("ada", "look", 30, "viewer")
    found = file.with_token(token)
    assert found is not None
    assert (found.name, found.role) == ("ada", "admin")
    assert [file.with_token(small).role, file.with_token(token + "x"), file.with_token("")] == ["viewer", None, None]  # type: ignore[union-attr]
    assert file.with_token(token, datetime.now(timezone.utc) + timedelta(days=31)) is None
    (number,) = [known.number for known in file.tokens() if known.note == "export"]
    file.revoke_token(number)
    assert file.with_token(token) is None
    assert file.with_token(small) is not None
    file.set_role("grace.h@clinic", "admin")
    file.remove("ada")
    assert file.with_token(small) is None


def test_a_token_never_may_more_than_its_user(file: UserFile) -> None:
    token = file.create_token("grace.h@clinic", "", 30)
    file.set_role("grace.h@clinic", "viewer")
    found = file.with_token(token)
    assert found is not None
    assert found.role == "viewer"


def test_another_process_sees_changes_at_once(file: UserFile, tmp_path: Path) -> None:
    server = UserFile(tmp_path / "home" / "users.json")
    assert server.with_password("ada", PASSWORD) is not None
    file.set_password("ada", "a new password")
    assert server.with_password("ada", PASSWORD) is None
    assert server.with_password("ada", "a new password") is not None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"users": []}', '{"users": {"ada": {}}}', '{"users": {"ada": {"role": "root"}}}', '{"users": 1}'],
)
def test_a_damaged_file_lets_nobody_in_and_is_not_overwritten(tmp_path: Path, text: str) -> None:
    path = tmp_path / "users.json"
    path.write_text(text)
    users = UserFile(path)
    for use in (
        lambda: bool(users),
        lambda: users.with_password("ada", PASSWORD),
        lambda: users.with_token("mshub_x"),
        lambda: users.add("ada", PASSWORD, "admin"),
    ):
        with pytest.raises(AccessError, match="damaged"):
            use()
    assert path.read_text() == text


def test_a_file_of_another_account_lets_nobody_in_and_says_whose_it_has_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, **_: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    users = UserFile(tmp_path / "users.json")
    users.add("ada", PASSWORD, "admin")
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(AccessError, match=r"cannot be read \(Permission denied\).* account the server runs as"):
        users.with_password("ada", PASSWORD)


# -- logins -----------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = datetime.now(timezone.utc) + timedelta(seconds=1)

    def __call__(self) -> datetime:
        return self.now

    def pass_(self, **time: float) -> None:
        self.now += timedelta(**time)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def logins(file: UserFile, tmp_path: Path, clock: Clock) -> Logins:
    return Logins(tmp_path / "logins.json", file, now=clock)


def name_of(logins: Logins, token: str) -> str | None:
    user = logins.user_of(token)
    return user.name if user else None


def test_a_login_is_good_for_a_working_day(logins: Logins, file: UserFile, clock: Clock) -> None:
    user = file.user("ada")
    assert user is not None
    token = logins.open(user)
    assert [name_of(logins, token), name_of(logins, token + "x"), name_of(logins, "")] == ["ada", None, None]
    clock.pass_(hours=HOURS - 0.1)
    assert name_of(logins, token) == "ada"
    clock.pass_(hours=0.2)
    assert name_of(logins, token) is None


def test_a_login_survives_a_restart_and_is_kept_as_a_hash(
    logins: Logins, file: UserFile, tmp_path: Path, clock: Clock
) -> None:
    user = file.user("ada")
    assert user is not None
    token = logins.open(user)
    path = tmp_path / "logins.json"
    assert token not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert name_of(Logins(path, file, now=clock), token) == "ada"
    logins.close(token)
    assert name_of(logins, token) is None
    assert name_of(Logins(path, file, now=clock), token) is None


def test_a_login_ends_with_its_password_and_its_user(logins: Logins, file: UserFile, clock: Clock) -> None:
    ada, grace = file.user("ada"), file.user("grace.h@clinic")
    assert ada is not None
    assert grace is not None
    first, second = logins.open(ada), logins.open(grace)
    users = json.loads(file._path.read_text())
    users["users"]["ada"]["since"] = (clock() + timedelta(minutes=1)).isoformat()
    file._path.write_text(json.dumps(users))
    assert [name_of(logins, first), name_of(logins, second)] == [None, "grace.h@clinic"]
    file.remove("grace.h@clinic")
    assert name_of(logins, second) is None


def test_a_guest_keeps_a_role_for_a_working_day_and_no_restart(
    logins: Logins, file: UserFile, tmp_path: Path, clock: Clock
) -> None:
    ada, guest = file.user("ada"), User("oidc:ada", "viewer", clock())
    assert ada is not None
    users_token, token = logins.open(ada), logins.open(guest, is_guest=True)
    assert logins.user_of(token) == guest
    restarted = Logins(tmp_path / "logins.json", file, now=clock)
    assert [name_of(restarted, users_token), name_of(restarted, token)] == ["ada", None]
    clock.pass_(hours=HOURS + 0.1)
    assert logins.user_of(token) is None


def test_a_guest_has_no_more_logins_than_a_user_and_is_logged_out_as_one(
    logins: Logins, file: UserFile, clock: Clock
) -> None:
    tokens = []
    for _ in range(MOST_PER_USER + 1):
        tokens.append(logins.open(User("oidc:ada", "viewer", clock()), is_guest=True))
        clock.pass_(seconds=1)
    assert [name_of(logins, tokens[0]), name_of(logins, tokens[1])] == [None, "oidc:ada"]
    logins.close(tokens[1])
    assert name_of(logins, tokens[1]) is None


def test_the_oldest_of_too_many_logins_gives_way(logins: Logins, file: UserFile, clock: Clock) -> None:
    user = file.user("ada")
    assert user is not None
    tokens = []
    for _ in range(MOST_PER_USER + 2):
        tokens.append(logins.open(user))
        clock.pass_(seconds=1)
    assert [name_of(logins, token) for token in tokens] == [None, None, *["ada"] * MOST_PER_USER]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', '{"a": ["ada", "yesterday"]}'])
def test_damaged_logins_are_forgotten(
    file: UserFile, tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "logins.json"
    path.write_text(text)
    logins = Logins(path, file)
    user = file.user("ada")
    assert user is not None
    assert name_of(logins, logins.open(user)) == "ada"
    assert (text == "[]") or "damaged" in caplog.text


# -- guessing ---------------------------------------------------------------------------------------------------------


def test_after_some_failures_each_takes_twice_as_long() -> None:
    time = 0.0
    throttle = Throttle(now=lambda: time)
    for _ in range(FREE):
        assert throttle.attempt("ada") == 0
    waits = []
    for _ in range(12):
        waits.append(throttle.attempt("ada"))
        time += waits[-1]
        assert throttle.attempt("ada") == 0
    assert waits[:4] == [1, 2, 4, 8]
    assert waits[-1] == LONGEST_S
    assert throttle.attempt("grace") == 0
    throttle.succeeded("ada")
    assert throttle.attempt("ada") == 0


def test_failures_of_long_ago_are_forgotten() -> None:
    time = 0.0
    throttle = Throttle(free=1, now=lambda: time)
    assert throttle.attempt("ada") == 0
    assert throttle.attempt("ada") == 1
    time += FORGET_S + 1
    assert throttle.attempt("ada") == 0
    assert throttle.attempt("ada") == 1


def test_people_who_mistype_once_a_day_never_add_up() -> None:
    time = 0.0
    throttle = Throttle(free=50, longest_s=10.0, now=lambda: time)
    for _ in range(200):
        for person in range(30):
            assert throttle.attempt("the clinic") == 0
            if person > 2:  # the others, with the right password
                throttle.take_back("the clinic")
            time += 4.0
        time += 86400.0 - 30 * 4.0


def test_of_many_attempts_at_once_no_more_are_free() -> None:
    throttle = Throttle()
    with ThreadPoolExecutor(16) as threads:
        waits = list(threads.map(lambda _: throttle.attempt("ada"), range(200)))
    assert waits.count(0) == FREE


def test_guesses_of_many_names_do_not_fill_the_memory() -> None:
    throttle = Throttle()
    for number in range(MOST_KEYS + 10):
        throttle.attempt(str(number))
    assert len(throttle._failures) == MOST_KEYS
