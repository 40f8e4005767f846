# All images for both architectures, with provenance and SBOM: docker buildx bake -f deploy/docker/bake.hcl --push
# TAG is also the version of the package in the images: a tag without its v.
variable "TAG" { default = "0.1.0" }
variable "REGISTRY" { default = "headrace" }

group "default" { targets = ["gateway", "controller", "worker-cpu", "worker-cuda"] }

target "all" {
  context   = "."
  args      = { VERSION = TAG }
  platforms = ["linux/amd64", "linux/arm64"]
  attest    = ["type=provenance,mode=max", "type=sbom"]
}
target "gateway" {
  inherits   = ["all"]
  dockerfile = "deploy/docker/gateway.Dockerfile"
  target     = "gateway"
  tags       = ["${REGISTRY}/gateway:${TAG}"]
}
target "controller" {
  inherits   = ["all"]
  dockerfile = "deploy/docker/gateway.Dockerfile"
  target     = "controller"
  tags       = ["${REGISTRY}/controller:${TAG}"]
}
target "worker-cpu" {
  inherits   = ["all"]
  dockerfile = "deploy/docker/worker.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}/worker-cpu:${TAG}"]
}
target "worker-cuda" {
  inherits   = ["all"]
  dockerfile = "deploy/docker/worker.Dockerfile"
  target     = "cuda"
  tags       = ["${REGISTRY}/worker-cuda:${TAG}"]
}
