#!/bin/sh
# net ADDRESS/PREFIX [INTERFACE]: bring up the network card by hand; without a call it stays down.
set -e
ip link set "${2:-eth0}" up
ip address add "$1" dev "${2:-eth0}"
echo "HOLDFAST-GUEST NET $1"
