# Runs application scripts (CONTRACT.md, section 5): those of one number in parallel, each in a session of its own,
# their output through a reader that keeps a little and drains the rest.
#
# One loop waits for all of them, on a pipe into which every helper writes what happened: `end`, when a script has
# ended; `eof`, when nobody holds its output any more; `tick`, each second, on which time limits are looked at. So a
# script, or a daemon that it left behind, can hold up nothing: at worst its time passes.

SCRIPT_HUNDREDTHS=3000
TERM_HUNDREDTHS=500
KILL_HUNDREDTHS=300
DRAIN_HUNDREDTHS=100
TRIES=3
OUTPUT_BYTES=65536

# Script number $1 as variables; `keep` writes back what changes.
load() {
    i=$1
    eval "app=\$app_$i folder=\$folder_$i try=\$try_$i stage=\$stage_$i"
    eval "begun=\$begun_$i limit=\$limit_$i code=\$code_$i"
    home=$dir/app/$app
}

keep() {
    eval "try_$i=\$try stage_$i=\$stage begun_$i=\$begun limit_$i=\$limit code_$i=\$code"
}

# --- one phase -------------------------------------------------------------------------------------------------

# Runs the scripts with the numbers $2…, in this order, for phase $1 and within $phase_until; those with the same two
# digits at once. After a failed `pre` the others are not started. `end_ticks` must follow.
run_phase() {
    phase=$1
    shift
    [ $# -gt 0 ] || return
    exec 8<>"$dir/events"
    [ -z "$ticker" ] || end_ticks
    # Ends with this process, even if that is killed.
    (while sleep 1 && [ -d /proc/$$ ]; do echo tick >&8; done) >/dev/null 2>&1 </dev/null &
    ticker=$!
    group=
    digits=
    for next; do
        load "$next"
        if [ "${app%%-*}" != "$digits" ]; then
            digits=${app%%-*}
            run_group $group
            group=
        fi
        group="$group $next"
    done
    run_group $group
}

end_ticks() {
    [ -z "$ticker" ] || kill "$ticker"
    ticker=
}

run_group() {
    if [ "$phase:$failed" = pre:yes ]; then
        for number; do
            load "$number"
            add_result skipped 0 0 0 'another one had failed before'
        done
        return
    fi
    open=$#
    for number; do
        load "$number"
        now
        begun=$now
        try=0
        launch
    done
    while [ "$open" -gt 0 ]; do
        read -r event of which at how <&8
        case $event:$of in
            tick:) for number; do on_tick "$number"; done ;;
            "end:$phase") on_end "$which" "$at" "$how" ;;
            "eof:$phase") on_eof "$which" "$at" ;;
        esac
    done
}

# Starts the script that is loaded, once more if it was before.
launch() {
    now
    has=$((phase_until - now))
    if [ "$has" -lt 100 ]; then
        if [ "$try" -eq 0 ]; then finish skipped 'no time was left'; else finish failed; fi
        return
    fi
    [ "$has" -le "$SCRIPT_HUNDREDTHS" ] || has=$SCRIPT_HUNDREDTHS
    try=$((try + 1))
    limit=$((now + has))
    stage=running
    code=
    keep
    run_script | read_output &
}

on_end() {
    load "$1"
    [ "$2" = "$try" ] || return
    case $stage in
        running) code=$3 ;;
        ending | killed)
            signal KILL # what is left of its group has had its time, too
            code=timeout
            ;;
        *) return ;;
    esac
    now
    stage=draining
    limit=$((now + DRAIN_HUNDREDTHS))
    keep
}

on_eof() {
    load "$1"
    [ "$2" = "$try" ] || return
    case $stage in
        draining) settle ;;
        running | ending | killed) # its helper is gone without a word
            code=127
            settle
            ;;
    esac
}

on_tick() {
    load "$1"
    now
    [ "$now" -ge "$limit" ] || return
    case $stage in
        running)
            signal TERM
            stage=ending
            limit=$((now + TERM_HUNDREDTHS))
            ;;
        ending)
            signal KILL
            stage=killed
            limit=$((now + KILL_HUNDREDTHS))
            ;;
        killed) # not even that ends it: it waits for a disk
            code=timeout
            settle
            return
            ;;
        draining) # something that it left behind holds its output
            settle
            return
            ;;
        again)
            launch
            return
            ;;
        *) return ;;
    esac
    keep
}

signal() {
    pid=
    { read -r pid pid_start <"$home/pid"; } 2>/dev/null
    [ -n "$pid" ] && kill "-$1" "-$pid" 2>/dev/null
}

# The script that is loaded has ended: again, or what did it come to?
settle() {
    case $code in
        0) finish ok ;;
        3) finish not_applicable ;;
        timeout) finish timeout ;;
        refused)
            why=
            { read -r why <"$home/refused"; } 2>/dev/null
            finish refused "$why"
            ;;
        75)
            if [ "$try" -ge "$TRIES" ]; then
                finish failed
                return
            fi
            now
            stage=again
            limit=$((now + 50))
            keep
            ;;
        *) finish failed ;;
    esac
}

finish() {
    stage=over
    keep
    open=$((open - 1))
    now
    why=$2
    case $1:$why in failed: | timeout:*) last_words ;; esac
    case $code in '' | *[!0-9]*) code=0 ;; esac
    add_result "$1" "$code" "$((now - begun))" "$try" "$why"
    case $1 in failed | timeout | refused | skipped) failed=yes ;; esac
    [ "$phase" = pre ] && know_holder
}

# Adds what it said last to $why.
last_words() {
    [ -s "$dir/out/$app.$phase" ] || return
    said=$(tail -n 1 "$dir/out/$app.$phase" | tr -d '\000')
    why=${why:+$why: }$(printf '%.200s' "$said")
}

# Adds to $results: outcome $1, exit code $2, hundredths of seconds $3, tries $4, detail $5.
describe() {
    fraction=$(($3 % 100))
    case $fraction in ?) fraction=0$fraction ;; esac
    quote "$5"
    line="\"name\":\"$app\",\"phase\":\"$phase\",\"outcome\":\"$1\",\"code\":$2"
    line="$line,\"seconds\":$(($3 / 100)).$fraction,\"tries\":$4,\"detail\":$json"
    results=${results:+$results,}{$line}
}

# The same, and keeps it for the log.
add_result() {
    describe "$@"
    echo "$app $phase $1 $2 $(($3 / 100)).$fraction" >>"$dir/results"
    # What is not there holds nothing, and has nothing to let go of.
    [ "$phase:$1" != pre:not_applicable ] || : >"$home/posted"
}

# Notes which process holds the application: a number alone may be another process's by the time it is looked for.
know_holder() {
    [ -f "$home/state/holder" ] || return
    holder=
    read -r holder <"$home/state/holder"
    start=none
    case $holder in '' | *[!0-9]*) holder=0 ;; *) started_at "$holder" || start=none ;; esac
    echo "$holder $start" >"$home/holder"
}

# --- one run, in a process of its own --------------------------------------------------------------------------

# Runs the script that is loaded through an open file that was judged: what was looked at is what is run.
run_script() {
    exec 2>&1 </dev/null
    judge
    [ "$phase" != pre ] || : >"$home/started" || refuse 'memory is full'
    hold=$((freeze_s + 10))
    [ "$phase" != pre ] || hold=$((hold + (phase_until - now) / 100))
    export STILLFRAME_JOB="$job" STILLFRAME_UUID="$uuid" STILLFRAME_PHASE="$phase" STILLFRAME_GOAL="$goal"
    option_of "${app#??-}"
    export STILLFRAME_APP_DIR="$real" STILLFRAME_OPTION="$word"
    export STILLFRAME_DEADLINE="$(((has + 50) / 100))"
    export STILLFRAME_HOLD="$hold" STILLFRAME_MOUNTS="$dir/mounts" STILLFRAME_SOCKETS="$dir/sockets"
    export STILLFRAME_STATE="$home/state" STILLFRAME_RECORDS="$home/records"
    [ "$phase" != post ] || export STILLFRAME_RESULT="${result:-ok}"
    # From memory nothing can be executed in many guests, but an interpreter can read it.
    interpreter=
    case $real in
        /run/*)
            read -r first <&9
            case $first in '#!'*) interpreter=${first#'#!'} ;; esac
            ;;
    esac
    cd /
    unset LC_ALL PWD OLDPWD
    setsid $interpreter /proc/self/fd/9 "$phase" 8>&- &
    script=$!
    started_at "$script"
    echo "$script $start" >"$home/pid"
    wait "$script"
    echo "end $phase $i $try $?" >&8
}

# Opens `run` as descriptor 9 and judges the open file, and the folders above as those that lead to it from here:
# names may change meanwhile, these do not. Sets $real to its folder.
judge() {
    cd -P "$folder" 2>/dev/null || refuse "$folder cannot be entered"
    real=$PWD
    [ -f run ] && [ ! -h run ] || refuse "$folder/run is no plain file"
    exec 9<run
    set -- .
    above=${real%/}
    up=.
    while [ -n "$above" ]; do
        up=$up/..
        set -- "$@" "$up"
        above=${above%/*}
    done
    set -- $(stat -L -c '%f %u' /proc/self/fd/9 "$@" 2>/dev/null)
    [ $# -ge 4 ] || refuse "$folder/run cannot be judged"
    [ $((0x$1 & 0xf000)) -eq $((0x8000)) ] || refuse "$folder/run is no plain file"
    [ $((0x$1 & 0x49)) -ne 0 ] || refuse "$folder/run is not executable"
    [ $((0x$1 & 0xc00)) -eq 0 ] || refuse "$folder/run is set-uid or set-gid"
    what=$folder/run
    while [ $# -gt 0 ]; do
        [ "$2" = 0 ] || refuse "$what does not belong to root"
        [ $((0x$1 & 0x12)) -eq 0 ] || refuse "$what can be changed by others than root"
        shift 2
        what="a folder above $folder/run"
    done
}

refuse() {
    echo "$1" >"$home/refused"
    echo "end $phase $i $try refused" >&8
    exit
}

# Sets $word to that of the policy for application $1.
option_of() {
    word=
    for option in $options; do
        [ "${option%%=*}" != "$1" ] || word=${option#*=}
    done
}

# Keeps the beginning of the output and reads on until nobody holds it. `dd` byte by byte: others keep what they have
# read to themselves until they end, and a daemon may never let them.
read_output() {
    # By `exec`: a redirection of the call would keep the old streams aside, and with them whoever waits for their
    # end.
    exec >/dev/null 2>&1
    if ! dd bs=1 count="$OUTPUT_BYTES" of="$dir/out/$app.$phase" 2>/dev/null || [ -s "$dir/out/$app.$phase" ]; then
        cat >/dev/null
    fi
    echo "eof $phase $i $try" >&8
}
