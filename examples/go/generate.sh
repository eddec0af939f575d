#!/bin/sh
# Writes v1/, the Go code of the API, from the .proto files of this repository. Needs protoc, protoc-gen-go and
# protoc-gen-go-grpc.
set -eu
cd "$(dirname "$0")"
protos=${MODELPRESS_PROTOS:-../../protos}
options=""
for file in "$protos"/modelpress_protos/v1/*.proto; do
  name=modelpress_protos/v1/$(basename "$file")
  options="$options --go_opt=M$name=modelpress/v1 --go-grpc_opt=M$name=modelpress/v1"
done
# shellcheck disable=SC2086  # both are several words
${PROTOC:-protoc} -I "$protos" -I "$protos/modelpress_protos/third_party" $options \
  --go_out=. --go_opt=module=modelpress --go-grpc_out=. --go-grpc_opt=module=modelpress \
  "$protos"/modelpress_protos/v1/*.proto
