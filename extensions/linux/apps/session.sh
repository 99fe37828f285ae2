# A session that is held from `pre` to `post`. Sourced by the application scripts beside it, which define for each line of
# $state/items:
#   client ITEM   runs the client program, statements on its input
#   first ITEM    statements that take hold; the client prints the line `held` after the last
#   beat          a statement that changes nothing, every second or so: whoever lost his session finds out
#   last ITEM     statements that let go; the client prints the line `ended` after the last
#   abandon       statements for when no `post` came: nothing, if the end of the session is enough
#   undo ITEM N   lets go from outside what the session can no longer let go of
#
# `pre` starts its script anew as `run hold`: that process is the holder. It pipes statements into one client per item, and
# the writer of the pipe is the timer and listens for `post`. Whoever dies takes the others with him: without its writer a
# client reads the end of its input and ends, which ends its session and what that holds; without a client, or the holder,
# the writers stop. No named pipe: nothing can hang on opening one, nothing is left behind.
#
# While a session is held its application may stand still, so nobody asks ten times a second whether there is news, which
# costs a program each time: who waits sleeps for a second, and is woken by SIGUSR1. A signal that is lost costs that second.

state=$STILLFRAME_STATE
read -r up _ </proc/uptime
begun=${up%.*} # uptime: no change of the wall clock moves a time limit
patience=$((STILLFRAME_DEADLINE * 3 / 4 + 1)) # seconds for a client to do what it is told; the rest is for letting go
why=

# Sets $now to the seconds since this script began.
clock() {
    read -r up _ </proc/uptime
    now=$((${up%.*} - begun))
}

nap() {
    sleep 0.1 2>/dev/null || sleep 1 # not every busybox knows fractions
}

# Sleeps for a second, or until woken. Needs `trap 'woken=yes' USR1`.
doze() {
    if [ -z "$woken" ]; then
        sleep 1 >/dev/null 2>&1 &
        [ -n "$woken" ] || wait $!
        [ -z "$woken" ] || kill $!
    fi
    woken=
}

# Sets $born to the time at which process $1 began: with its number a name that is never given again.
born_at() {
    born=
    { read -r line <"/proc/$1/stat"; } 2>/dev/null || return
    set -- ${line##*) }
    shift 19 2>/dev/null && born=$1
}

# Lets this process be woken by way of the file $1.
sleeper() {
    woken=
    trap 'woken=yes' USR1
    read -r me _ </proc/self/stat # $$ would be the parent's, in a part of a pipe
    born_at "$me"
    echo "$me $born" >"$1"
}

# Wakes who is named in the file $1, if that is still the same process.
wake() {
    read -r sleeping since <"$1" && born_at "$sleeping" && [ "$born" = "$since" ] && kill -USR1 "$sleeping"
} 2>/dev/null

# Whether the file $2 holds the line $1.
said() {
    while read -r line; do
        [ "$line" != "$1" ] || return 0
    done <"$2"
    return 1
} 2>/dev/null

# Sets $why to the first complaint of a client, or of the one whose errors are in file $1.
complaint() {
    [ $# -gt 0 ] || set -- "$state"/err.* "$state"/out.*
    for file; do
        while IFS= read -r line; do
            case $line in 'ERROR at line '*) ;; *rror* | *ERROR* | *FATAL* | *ORA-*) why=$line && return ;; esac
        done 2>/dev/null <"$file"
    done
    why=${why:-the client ended}
}

# `pre`: starts the holder and waits until all is held. Else lets go of everything, sets $why and $item, and fails.
take_hold() {
    sleeper "$state/sleeper"
    # By this very file, and by an interpreter: memory may forbid execution.
    setsid sh "$0" hold "$((begun + STILLFRAME_HOLD))" </dev/null >/dev/null 2>&1 &
    number=0
    while read -r item; do
        number=$((number + 1))
        until said held "$state/out.$number"; do
            clock
            if [ -e "$state/over" ]; then
                complaint
            elif [ "$now" -ge "$patience" ]; then
                why="not held within $now s"
            else
                doze
                continue
            fi
            failed_item=$item
            failed_why=$why
            give_back :
            item=$failed_item
            why=$failed_why
            return 1
        done
    done <"$state/items"
}

# `run hold UPTIME`: the holder, until `post` or that uptime.
hold() {
    end=$(($1 - begun))
    # `resume` says so as soon as the guest is thawed.
    trap 'release' USR1
    : >"$state/signal"
    # A `post` that was quicker, or has swept up already.
    [ ! -e "$state/release" ] && echo $$ >"$state/holder" || exit
    number=0
    pids=
    while read -r item; do
        number=$((number + 1))
        {
            statements "$item" "$number" | client "$item" 2>"$state/err.$number" | listen >"$state/out.$number"
            : >"$state/over"
            wake "$state/sleeper"
        } &
        pids="$pids $!"
    done <"$state/items"
    for pid in $pids; do
        while kill -0 "$pid" 2>/dev/null; do
            wait "$pid" # a signal ends that, too
        done
    done
}

# Passes on what a client says, and wakes who waits for that.
listen() {
    while IFS= read -r line || [ -n "$line" ]; do
        printf '%s\n' "$line"
        [ "$line" != held ] || wake "$state/sleeper"
    done
}

# Lets all sessions go.
release() {
    : >"$state/release"
    for writer in "$state"/writer.*; do
        wake "$writer"
    done
}

# What one client reads, number $2. Each failed write means that the client is gone: a signal may not come, the agent ignores it.
statements() {
    sleeper "$state/writer.$2"
    first "$1" || return
    until [ -e "$state/release" ]; do
        clock
        # The time, one of the others, the holder or its folder is gone: the client sees the end of its input.
        [ "$now" -lt "$end" ] && [ ! -e "$state/over" ] && [ -e "$state/holder" ] && kill -0 $$ || break
        doze
        [ -e "$state/release" ] || beat || return
    done
    if [ -e "$state/release" ]; then last "$1"; else abandon; fi
} 2>/dev/null

# Lets go of all that is held and waits until the last client has ended. Fails, and sets $why, if the holder was gone
# before, or had to be killed.
let_go() {
    pid=
    { read -r pid <"$state/holder"; } 2>/dev/null
    alive=no
    [ -z "$pid" ] || ! kill -0 "$pid" 2>/dev/null || alive=yes
    [ -e "$state/release" ] && alive=yes # it was told before, and lived then
    release
    why=
    [ $alive = yes ] || why="its session had ended before"
    # The holder leads a process group: it is there as long as one of its members. (No `--`: busybox does not know it.)
    while [ -n "$pid" ] && kill -0 "-$pid" 2>/dev/null; do
        clock
        if [ "$now" -ge $((STILLFRAME_DEADLINE * 9 / 10)) ]; then
            kill -KILL "-$pid"
            why="its client did not end within $now s and was killed"
            break
        fi
        nap
    done
    [ -z "$why" ]
}

# `post`: lets go of all. Calls `$1 ITEM N` for what was held to the end; else fails, and sets $why and $item.
give_back() {
    problem=
    lost=
    let_go
    how=$why
    number=0
    while read -r item; do
        number=$((number + 1))
        if said ended "$state/out.$number"; then
            $1 "$item" "$number"
            continue
        fi
        why=$how
        complaint
        problem=${problem:-$why}
        lost=${lost:-$item}
        undo "$item" "$number"
    done <"$state/items"
    sweep
    item=$lost
    why=${problem:-$how}
    [ -z "$why" ]
}

# Removes what a held session leaves in memory.
sweep() {
    set -- "$state"/*
    [ ! -e "$1" ] || rm -f "$state"/out.* "$state"/err.* "$state"/writer.* "$state/items" "$state/over" "$state/holder" \
        "$state/sleeper" "$state/signal"
}
