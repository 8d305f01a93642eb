# `make help`: targets by group (`##@ Group`), one line each (`target: ... ## what it does`).
BEGIN { FS = ":.*## " }
/^##@ / { printf "\n\033[1m%s\033[0m\n", substr($0, 5); next }
/^[a-z-]+:.*## / { printf "  \033[36m%-21s\033[0m %s\n", $1, $2 }
