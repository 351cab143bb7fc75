import sys

from restore_ext.integrations.vlmevalkit import main

sys.exit(main(sys.argv[1:]))
