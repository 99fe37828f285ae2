"""Stand-ins for MongoDB and Oracle, which cannot be had here: small programs in a guest that keep a lock, or a backup
mode, in a file and understand what the scripts under test say to them, and nothing else.

They hold the scripts to their own rules (who lets go, how often, after which death); whether a real server understands
the same words they cannot say.
"""

from __future__ import annotations

from orchestrator.demo.in_guest import guest_out
from tests.guests.machines import Guest

MONGO = "/run/stand-in-mongodb"
ORACLE = "/opt/stand-in-oracle"

# `count`: locks held; `log`: what was done; a file `hang` makes the lock come without an answer.
_MONGOSH = rf"""#!/bin/sh
for file; do :; done
place={MONGO}
echo "$*" >>$place/argv
cp "$file" $place/last.js
read -r count <$place/count
if [ -e $place/refuse ]; then
    echo 'MongoServerError: not authorized on admin to execute command' >&2
    exit 1
fi
case $(cat "$file") in
    *'run({{fsync: 1, lock: true}})'*)
        if [ "$count" -gt 0 ]; then
            sed -n 's/.*new Error("\(somebody.*\)").*/Error: \1/p' "$file" >&2
            exit 1
        fi
        echo free
        echo $((count + 1)) >$place/count
        echo lock >>$place/log
        [ ! -e $place/hang ] || sleep 999
        echo held
        ;;
    *'run({{fsyncUnlock: 1}})'*)
        if [ "$count" -gt 0 ]; then
            echo $((count - 1)) >$place/count
            echo unlock >>$place/log
        fi
        echo ended
        ;;
esac
"""

# `mode`: off, or backup; `archiving`: off makes BEGIN BACKUP fail; `log`: what was done.
_SQLPLUS = rf"""#!/bin/sh
place={ORACLE}/$ORACLE_SID
echo "$(id -un) $*" >>$place/argv
strict=no
complain() {{
    echo 'ERROR at line 1:'
    echo "$1"
    [ $strict = no ] || exit 1
}}
while read -r line; do
    case $line in
        'WHENEVER SQLERROR EXIT FAILURE') strict=yes ;;
        'WHENEVER SQLERROR CONTINUE') strict=no ;;
        'ALTER SYSTEM ARCHIVE LOG CURRENT;') echo archive >>$place/log ;;
        'ALTER DATABASE BEGIN BACKUP;')
            if [ -e $place/noarchivelog ]; then
                complain 'ORA-01123: cannot start online backup; media recovery not enabled'
            else
                echo backup >$place/mode
                echo begin >>$place/log
            fi
            ;;
        'ALTER DATABASE END BACKUP;')
            if [ "$(cat $place/mode)" = off ]; then
                complain 'ORA-01142: cannot end online backup - none of the files are in backup'
            else
                echo off >$place/mode
                echo end >>$place/log
            fi
            ;;
        "SELECT 'scn '"*) echo 'scn 4711' ;;
        'PROMPT '*) echo "${{line#PROMPT }}" ;;
        EXIT) exit ;;
    esac
done
"""


def _program(guest: Guest, path: str, text: str) -> None:
    guest_out(guest.domain, f"cat >{path}; chmod 0755 {path}", stdin=text.encode())


def mongodb_up(guest: Guest) -> None:
    """A socket that somebody listens on, and a shell."""
    _program(guest, "/usr/bin/mongosh", _MONGOSH)
    perl = "my $s = IO::Socket::UNIX->new(Local => q(/tmp/mongodb-27017.sock), Listen => 1) or die; sleep 99999"
    guest.out(
        f"mkdir {MONGO}; echo 0 >{MONGO}/count; : >{MONGO}/log; rm -f /tmp/mongodb-*.sock;"
        f"setsid perl -MIO::Socket::UNIX -e '{perl}' </dev/null >/dev/null 2>&1 & echo $! >/run/stand-in-mongodb.pid"
    )
    guest.out("until grep -q mongodb-27017 /proc/net/unix; do sleep 0.1; done")


def mongodb_down(guest: Guest) -> None:
    guest.out(f"kill $(cat /run/stand-in-mongodb.pid); rm -rf {MONGO} /usr/bin/mongosh /tmp/mongodb-*.sock")


def oracle_up(guest: Guest) -> None:
    """Two databases, ONE and TWO: processes with their names, and a client in their home."""
    guest.out(
        f"mkdir -p {ORACLE}/home/bin; cp /usr/bin/sleep {ORACLE}/home/bin/oracle; useradd -M oracle; : >/etc/oratab"
    )
    _program(guest, f"{ORACLE}/home/bin/sqlplus", _SQLPLUS)
    for sid in ("ONE", "TWO"):
        guest.out(f"mkdir {ORACLE}/{sid}; echo off >{ORACLE}/{sid}/mode; : >{ORACLE}/{sid}/log")
    guest.out(f"chown -R oracle {ORACLE}")
    for name in ("ora_pmon_ONE", "ora_pmon_TWO", "asm_pmon_+ASM"):
        perl = f"exec {{q({ORACLE}/home/bin/oracle)}} q({name}), 99999"
        guest.out(f"cd /; setsid setpriv --reuid oracle --clear-groups perl -e '{perl}' </dev/null >/dev/null 2>&1 &")
    guest.out("until [ $(grep -l _pmon_ /proc/[0-9]*/cmdline 2>/dev/null | wc -l) -ge 3 ]; do sleep 0.1; done")


def oracle_down(guest: Guest) -> None:
    guest.out(f"rm /etc/oratab; pkill -KILL -u oracle; rm -rf {ORACLE}; userdel oracle")
