BUILDER := python3 -m image.builder
TOOLS   := $(BUILDER) tools

.PHONY: image
image: ## build build/image/holdfast.raw
	@$(BUILDER) image
