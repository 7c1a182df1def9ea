#!/bin/sh
# The guest's console for tests: no echo and no line editing, and a prompt that says the last exit code.
stty -echo
code=0
while printf 'guest[%d]# ' "$code"; read -r line; do
    sh -c "$line" 2>&1
    code=$?
done
