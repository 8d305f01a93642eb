# `make help`: targets by group (`##@ Group`), one line each (`target: ... ## what it does`); colours on a terminal.
BEGIN { FS = ":.*## "; if (colour) { bold = "\033[1m"; cyan = "\033[36m"; plain = "\033[0m" } }
/^##@ / { printf "\n%s%s%s\n", bold, substr($0, 5), plain; next }
/^[a-z-]+:.*## / { printf "  %s%-21s%s %s\n", cyan, $1, plain, $2 }
